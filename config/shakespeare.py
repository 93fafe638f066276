# A Backpack on Shakespeare's plays, with a byte-level BPE of 4,096 tokens learned from them.
#   python prepare_data.py --dataset=shakespeare
#   python train.py config/shakespeare.py && python sample.py --run=out/shakespeare
# hardware: 2 CPU cores, 6 minutes; validation loss 3.82, its Transformer's (--n_sense=0) 3.84
# (measured 2026-11-28; in the same time as the Backpack it comes to 3.73: lab/notes/small_runs.md)

out_dir = "out/shakespeare"
dataset = "shakespeare"

block_size = 64
n_layer, n_head, n_embd, n_sense = 3, 4, 128, 16
n_qk = 16  # the paper's n_embd / n_sense would be only 8 here
sense_mlp_ratio, sense_out_ratio = 1, 2
init_std = 0.08  # about n_embd ** -0.5

tokens_per_step = 24 * 64
batch_size = 24
max_iters = 1910
learning_rate, muon_lr = 3e-3, 0.02  # with Muon, transformer_share no longer helps here
warmup_iters = 100
beta2 = 0.99

eval_interval = 500
eval_iters = 50
log_interval = 50
