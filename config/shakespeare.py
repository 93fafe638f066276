# A Backpack on Shakespeare's plays, with a byte-level BPE of 4,096 tokens learned from them.
#   python prepare_data.py --dataset=shakespeare
#   python train.py config/shakespeare.py && python sample.py --run=out/shakespeare
# hardware: 2 CPU cores, about 8 minutes; validation loss 3.82, its Transformer (--n_sense=0) 3.89
# (measured 2026-11-23)

out_dir = "out/shakespeare"
dataset = "shakespeare"

block_size = 64
n_layer, n_head, n_embd, n_sense = 4, 4, 128, 16
n_qk = 32  # the paper's n_embd / n_sense would be only 8 here
init_std = 0.08  # about n_embd ** -0.5
transformer_share = 0.75  # lab/notes/small_runs.md

tokens_per_step = 24 * 64
batch_size = 24
max_iters = 2000
learning_rate, min_lr, schedule = 4e-3, 4e-4, "cosine"
warmup_iters = 100
beta2 = 0.99

eval_interval = 500
eval_iters = 50
log_interval = 50
