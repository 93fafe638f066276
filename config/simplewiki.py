# A Backpack on Simple English Wikipedia, with a byte-level BPE of 8,192 tokens learned from it.
#   python prepare_data.py --dataset=simplewiki
#   python train.py config/simplewiki.py && python sample.py --run=out/simplewiki
# hardware: 2 CPU cores, 110 minutes on a busy machine; validation loss 3.80 (pretrained/simplewiki)
# After 1,000 steps: 4.94; its Transformer (--n_sense=0) 5.23 (measured 2026-11-23)

out_dir = "out/simplewiki"
dataset = "simplewiki"

block_size = 128
n_layer, n_head, n_embd, n_sense = 4, 6, 192, 16
n_qk = 32
sense_mlp_ratio = 1  # with 4, half of all parameters would be in the sense network
init_std = 0.07  # about n_embd ** -0.5
transformer_share = 0.75  # lab/notes/small_runs.md

tokens_per_step = 16 * 128
batch_size = 16
max_iters = 9000
learning_rate, min_lr, schedule = 2e-3, 2e-4, "cosine"
warmup_iters = 200
beta2 = 0.99

eval_interval = 250
eval_iters = 16
log_interval = 50
