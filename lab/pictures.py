"""Pictures of what senses.py finds, through matplotlib."""
from tokenizer import require


def draw(file, title, panels=(), heat=None):
    """A picture: a bar panel for each (name, [(token, score)]), or a heat map (numbers (K,T), tokens)."""
    require("matplotlib", "--plot").use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    if heat:
        values, names = heat
        figure, axes = plt.subplots(figsize=(max(6, 0.42 * len(names) + 2), 1.6 + 0.26 * len(values)),
                                    layout="constrained")
        most = abs(values).max()
        image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        axes.set(xticks=range(len(names)), yticks=range(len(values)), ylabel="sense")
        axes.set_xticklabels(names, rotation=60, ha="right", rotation_mode="anchor")
        figure.colorbar(image, label="part of the logit")
    else:
        across = min(4, len(panels))
        down = -(-len(panels) // across)
        longest = max(len(bars) for _, bars in panels)
        figure, axes = plt.subplots(down, across, figsize=(3 * across, down * (0.5 + 0.2 * longest)), squeeze=False,
                                    layout="constrained", sharex=True)
        for axis in axes.flat[len(panels):]:
            axis.axis("off")
        for axis, (name, bars) in zip(axes.flat, panels):
            tokens, scores = zip(*bars[::-1])
            axis.barh(range(len(bars)), scores, color=["#1f6fb4" if v > 0 else "#c44e52" for v in scores], height=0.7)
            axis.set_yticks(range(len(bars)), [token[:18] for token in tokens])
            axis.set_title(name, loc="left", fontsize=9, fontweight="bold")
    figure.suptitle(title, fontweight="bold")
    figure.savefig(file, dpi=150)
