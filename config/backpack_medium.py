# A Backpack of GPT-2 medium's size on FineWeb-Edu. The paper has no model of this size: the recipe
# is ours, UNTESTED.
#   python prepare_data.py --dataset=fineweb_edu
#   torchrun --nproc_per_node=8 train.py config/backpack_medium.py
# hardware: 8 A100-80GB; time and loss: not measured
# On a pretended GPU (lab/notes/cost.md) batch_size=32 needs 25.9 GB, compiled 24.2; 24 GB take 16.
# By arithmetic an H100 trains 180,000 tokens/s, an A100 63,000. Never run on a real one.

out_dir = "out/backpack_medium"
dataset = "fineweb_edu"

block_size = 512
n_layer, n_head, n_embd, n_sense = 24, 16, 1024, 16

tokens_per_step = 512 * 1024
batch_size = 32  # sequences per GPU and micro-batch
max_iters = 100_000
learning_rate, min_lr, schedule = 0.0003, 3e-05, "cosine"
warmup_iters = 2000
beta2 = 0.95
