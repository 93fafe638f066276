# A Backpack of GPT-2 xl's size on FineWeb-Edu. The paper has no model of this size: the recipe is
# ours, UNTESTED.
#   python prepare_data.py --dataset=fineweb_edu
#   torchrun --nproc_per_node=8 train.py config/backpack_xl.py
# hardware: 8 H100-80GB; time and loss: not measured
# On a pretended GPU (lab/notes/cost.md) batch_size=16 needs 58.2 GB, compiled 54.0; too much for 24 GB.
# By arithmetic an H100 trains 47,000 tokens/s, an A100 16,000. Never run on a real one.

out_dir = "out/backpack_xl"
dataset = "fineweb_edu"

block_size = 512
n_layer, n_head, n_embd, n_sense = 48, 25, 1600, 16
n_qk = 104  # n_embd / n_sense would be 100, whose rows fast kernels for 16 bits do not take (8 divides 104)

tokens_per_step = 512 * 1024
batch_size = 16  # sequences per GPU and micro-batch
max_iters = 100_000
learning_rate, min_lr, schedule = 0.0002, 2e-05, "cosine"
warmup_iters = 2000
beta2 = 0.95
