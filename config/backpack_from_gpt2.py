# A Backpack that starts from GPT-2: contextualizer and embedding are GPT-2's, the senses are new
# (our recipe).
#   python -m lab.convert --source=openai-community/gpt2 --n_sense=16 --dest=out/gpt2_senses
#   torchrun --nproc_per_node=4 train.py config/backpack_from_gpt2.py
# With --freeze=wte,wpe,blocks,ln_f only the senses train, on GPT-2 as it is: half the FLOPs of a step, and a
# peak of 2.5 GB instead of 7.1 (16 sequences, compiled, on a pretended GPU).
# hardware: 4 A100-40GB; UNTESTED at this size. In small trials on a CPU, that was no worse than to train all
# for the same time, and far better than from scratch; first the senses, then all, was no better than either
# (lab/notes/small_runs.md). There transformer_share=0.5 did not help.

out_dir = "out/backpack_from_gpt2"
init_from = "out/gpt2_senses"
dataset = "openwebtext"

max_iters = 10000
learning_rate, min_lr, schedule = 3e-4, 0.0, "linear"
warmup_iters = 1000
