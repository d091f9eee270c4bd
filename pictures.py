"""Scores of experts as a heat map: in text, or drawn with matplotlib where it is asked for."""

Scores = dict[str, dict[str, dict[str, float]]]  # as in a score file
Experts = dict[str, list[int]]  # layer -> the selected experts

SHADES = " ░▒▓█"


def score_rows(scores: Scores, score: str) -> tuple[list[str], list[list[float]]]:
    """Returns the layers, in order, and the scores of each layer's experts, in order."""
    values = scores[f"{score}_scores"]
    layers = sorted(values, key=int)
    return layers, [[values[layer][e] for e in sorted(values[layer], key=int)] for layer in layers]


def heat_map_text(scores: Scores, score: str, experts: Experts) -> str:
    """Returns a heat map in blocks of text. A line is a layer, a column an expert. Below a layer
    with selected experts, they are marked."""
    layers, rows = score_rows(scores, score)
    highest = max(map(max, rows)) or 1.0
    said = f"{score} scores of {len(rows[0])} experts, from 0 to █ {highest:.3f}"
    lines = [f"{said}{'; ^ selected' if any(experts.values()) else ''}", "layer"]
    for layer, row in zip(layers, rows):
        shades = (SHADES[round(value / highest * (len(SHADES) - 1))] for value in row)
        lines.append(f"{layer:>5} {''.join(shades)}")
        if chosen := experts.get(layer):
            lines.append(" " * 6 + "".join("^" if e in chosen else " " for e in range(len(row))))
    return "\n".join(line.rstrip() for line in lines)


def draw_scores(axes, scores: Scores, score: str, experts: Experts) -> None:
    """Draws a heat map of the scores into matplotlib's `axes`, with the selected experts marked."""
    layers, rows = score_rows(scores, score)
    image = axes.imshow(rows, aspect="auto", cmap="viridis")
    marks = [(e, i) for i, layer in enumerate(layers) for e in experts.get(layer, [])]
    if marks:
        axes.scatter(*zip(*marks), marker="s", s=30, facecolors="none", edgecolors="red")
    axes.set_yticks(range(len(layers)), layers)
    marked = " (red: selected)" if marks else ""
    axes.set(xlabel="expert", ylabel="layer", title=f"{score} scores{marked}")
    axes.figure.colorbar(image, ax=axes)


def plot_scores(scores: Scores, score: str, experts: Experts, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1.5 + 0.25 * len(scores[f"{score}_scores"])), layout="constrained")
    draw_scores(figure.subplots(), scores, score, experts)
    figure.savefig(path, dpi=120)
