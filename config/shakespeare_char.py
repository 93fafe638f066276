# A Backpack on Shakespeare's plays, one token per character.
#   python prepare_data.py && python train.py config/shakespeare_char.py && python sample.py
# hardware: 2 CPU cores, 4 minutes; validation loss 1.52 (measured 2026-11-29)
# after 2,450 steps 1.42; its Transformer (--n_sense=0) 1.38 in the same time: lab/notes/small_runs.md

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"

block_size = 64
n_layer, n_head, n_embd, n_sense = 4, 4, 128, 16
n_qk = 32  # the paper's n_embd / n_sense would be only 8 here
sense_mlp_ratio, sense_out_ratio = 1, 2  # with 4, steps take 1.14 times as long, and learn no more
init_std = 0.08  # about n_embd ** -0.5
transformer_share = 0.75  # without it the Transformer inside collapses: lab/notes/small_runs.md

tokens_per_step = 24 * 64
batch_size = 24
max_iters = 1250
learning_rate, muon_lr = 3e-3, 0.02
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 25
log_interval = 50
