# A Backpack on Shakespeare's plays, one token per character.
#   python prepare_data.py && python train.py config/shakespeare_char.py && python sample.py
# hardware: 2 CPU cores, 4 minutes; validation loss 1.53 as printed (on all of val.bin 1.525),
# its Transformer's (--n_sense=0) 1.50 after 1,250 steps (measured 2026-11-28)

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"

block_size = 64
n_layer, n_head, n_embd, n_sense = 4, 4, 128, 16
n_qk = 32  # the paper's n_embd / n_sense would be only 8 here
init_std = 0.08  # about n_embd ** -0.5
transformer_share = 0.75  # without it the Transformer inside collapses: lab/notes/small_runs.md

tokens_per_step = 24 * 64
batch_size = 24
max_iters = 1200
learning_rate, muon_lr = 3e-3, 0.02
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 25
log_interval = 50
