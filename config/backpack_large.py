# A Backpack of GPT-2 large's size on FineWeb-Edu. The paper has no model of this size: the recipe
# is ours, UNTESTED.
#   python prepare_data.py --dataset=fineweb_edu
#   torchrun --nproc_per_node=8 train.py config/backpack_large.py
# hardware: 8 A100-80GB; time and loss: not measured
# On a pretended GPU (lab/notes/cost.md) batch_size=32 needs 47.3 GB, compiled 45.3; too much for 24 GB.
# By arithmetic an H100 trains 89,000 tokens/s, an A100 31,000. Never run on a real one.

out_dir = "out/backpack_large"
dataset = "fineweb_edu"

block_size = 512
n_layer, n_head, n_embd, n_sense = 36, 20, 1280, 16

tokens_per_step = 512 * 1024
batch_size = 32  # sequences per GPU and micro-batch
max_iters = 100_000
learning_rate, min_lr, schedule = 0.00025, 2.5e-05, "cosine"
warmup_iters = 2000
beta2 = 0.95
