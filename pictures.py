"""Scores of experts as a heat map: in text, or drawn with matplotlib where it is asked for."""

Scores = dict[str, dict[str, dict[str, float]]]  # as in a score file
Experts = dict[str, list[int]]  # layer -> the selected experts

SHADES = " ░▒▓█"
WIDTH = 64  # experts in a line of text


def score_rows(scores: Scores, score: str) -> tuple[list[str], list[list[float]]]:
    """Returns the layers, in order, and the scores of each layer's experts, in order."""
    values = scores[f"{score}_scores"]
    layers = sorted(values, key=int)
    return layers, [[values[layer][e] for e in sorted(values[layer], key=int)] for layer in layers]


def heat_map_text(scores: Scores, score: str, experts: Experts) -> str:
    """Returns a heat map in blocks of text. A line is a layer, or 64 experts of it; a column is an
    expert. Below a line with selected experts, they are marked."""
    layers, rows = score_rows(scores, score)
    highest = max(map(max, rows)) or 1.0
    said = f"{score} scores of {len(rows[0])} experts, from 0 to █ {highest:.3f}"
    lines = [f"{said}{'; ^ selected' if any(experts.values()) else ''}", "layer"]
    for layer, row in zip(layers, rows):
        shades = [SHADES[round(value / highest * (len(SHADES) - 1))] for value in row]
        marks = ["^" if e in experts.get(layer, []) else " " for e in range(len(row))]
        for first in range(0, len(row), WIDTH):
            label = layer if first == 0 else f"+{first}"
            lines.append(f"{label:>5} {''.join(shades[first : first + WIDTH])}")
            if "^" in marks[first : first + WIDTH]:
                lines.append(" " * 6 + "".join(marks[first : first + WIDTH]))
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
