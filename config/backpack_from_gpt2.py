# A Backpack that starts from GPT-2: contextualizer and embedding are GPT-2's, the senses are new
# (our recipe).
#   python -m lab.convert --source=openai-community/gpt2 --n_sense=16 --dest=out/gpt2_senses
#   torchrun --nproc_per_node=4 train.py config/backpack_from_gpt2.py
# hardware: 4 A100-40GB; UNTESTED at this size. A small trial on 2 CPU cores, 2026-11-23, one seed,
# learning rate 1e-3, from the Transformer of the config/shakespeare.py of that day (AdamW, 4 layers;
# validation loss 3.89): the loss starts at 8.33 and reaches 4.04 in a run of 500 steps and 3.82 in
# one of 2,000; from scratch 4.25 and 3.82. transformer_share=0.5 did not help (4.03 and 3.83).

out_dir = "out/backpack_from_gpt2"
init_from = "out/gpt2_senses"
dataset = "openwebtext"

max_iters = 10000
learning_rate, min_lr, schedule = 3e-4, 0.0, "linear"
warmup_iters = 1000
