# A Backpack on Simple English Wikipedia, with a byte-level BPE of 16,384 tokens learned from it.
#   python prepare_data.py --dataset=simplewiki
#   python train.py config/simplewiki.py --dtype=bfloat16 && python sample.py --run=out/simplewiki
# hardware: 2 CPU cores, 125 minutes; validation loss 3.79, 1.378 bits per byte
# (measured 2026-11-28, every third article of 2021; pretrained/simplewiki went on from there)
# bfloat16 takes 0.8 to 0.9 of the time on a CPU with AVX512-BF16 or AMX, on others many times as long

out_dir = "out/simplewiki"
dataset = "simplewiki"

block_size = 256
n_layer, n_head, n_embd, n_sense = 4, 5, 160, 16
n_qk = 32  # the paper's n_embd / n_sense would be only 10 here
# with 4, a third of all parameters would be in the sense network
sense_mlp_ratio, sense_out_ratio = 1, 2
init_std = 0.07  # of the order of n_embd ** -0.5

tokens_per_step = 16 * 256
batch_size = 16
max_iters = 7000
learning_rate, muon_lr = 3e-3, 0.01  # of embeddings, biases and norms; of matrices
warmup_iters = 100
beta2 = 0.99

eval_interval = 500
eval_iters = 16
log_interval = 50
