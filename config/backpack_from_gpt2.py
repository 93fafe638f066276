# A Backpack that starts from GPT-2: its weights become the contextualizer and the embedding, its senses are new (ours).
#   python convert.py --source=openai-community/gpt2 --n_sense=16 --out_dir=out/gpt2_senses
#   torchrun --nproc_per_node=4 train.py config/backpack_from_gpt2.py
# hardware: 4 A100-40GB; UNTESTED at this size

out_dir = "out/backpack_from_gpt2"
init_from = "out/gpt2_senses"
dataset = "openwebtext"

transformer_share = 0.5   # GPT-2 goes on with its own task while the senses learn theirs
max_iters = 10000
learning_rate, min_lr, schedule = 3e-4, 0.0, "linear"
warmup_iters = 1000
