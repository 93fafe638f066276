# The paper's Backpack "mini" on OpenWebText.
#   python prepare_data.py --dataset=openwebtext
#   torchrun --nproc_per_node=4 train.py config/backpack_mini.py
# hardware: 4 A100-40GB, 3 to 4 days (paper)
# validation perplexity on OpenWebText: 23.5 (paper)
# Everything not set here is train.py's default, which is the paper's recipe. The paper trained in
# fp16; dtype=auto takes bf16 if the GPU supports it.
# On a pretended GPU (lab/notes/cost.md) batch_size=64 needs 12.6 GB, compiled 11.8; also fits 24 GB.
# By arithmetic an H100 trains 650,000 tokens/s, an A100 240,000. Never run on a real one.

out_dir = "out/backpack_mini"
dataset = "openwebtext"

block_size = 512
n_layer, n_head, n_embd, n_sense = 8, 8, 640, 16
dropout = 0.1

tokens_per_step = 512 * 1024
batch_size = 64  # sequences per GPU and micro-batch
