"""What a report comes to, at its top."""

import math

from randes.inspect.report.html import escaped
from randes.inspect.report.numbers import Numbers
from randes.inspect.report.pictures import figures


def verdict(numbers: Numbers) -> str:
    """What the page comes to: the size, the noise in each model, and what to do next."""
    sizes, names = numbers.sizes, [name for name in numbers.names if name != "__base__"]
    lines = [f"<b>Size:</b> {sizes.total / sizes.base:.2f} times one model."] if sizes.base else []
    noise = {name: own.relative(own.predicted) for name in names if math.isfinite((own := numbers.together(name)).size)}
    noise = {name: value for name, value in noise.items() if math.isfinite(value)}
    if noise:
        worst = max(noise, key=noise.__getitem__)
        mean = sum(noise.values()) / len(noise)
        lines.append(
            f"<b>Noise:</b> {figures(mean)} times a delta's size in the mean, most in {escaped(worst)}"
            f" ({figures(noise[worst])}), as predicted. It is spread over all directions, and is not the"
            " accuracy."
        )
    if wrong := [name for name, found in numbers.verified.items() if not found.kept_exact]:
        lines.append(f"<b>Wrong:</b> kept tensors of {escaped(', '.join(wrong))} did not come back exactly.")
    if not names:
        lines.append("<b>Next:</b> add a fine-tune (<code>randes add</code>).")
    elif numbers.packing is None:
        two = numbers.packed[2].total / sizes.base if sizes.base else 0.0
        lines.append(
            f"<b>Next:</b> evaluate each model as it is served. For serving, <code>randes pack --bits 2</code> makes"
            f" {two:.2f} times one model of this."
        )
    else:
        lines.append("<b>Next:</b> evaluate each model as it is served from this store.")
    return "<ul id='verdict'>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"
