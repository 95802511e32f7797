"Figures show what a clip holds, and nothing else"
import torch
from vidlab.viz import show_strip


def test_padding_is_not_shown():
    "Of six frames, two of them padding, four are drawn: no black picture at the end"
    video = torch.full((6, 3, 8, 8), 200, dtype=torch.uint8)
    video[4:] = 0
    fig = show_strip(video, mask=torch.arange(6) < 4)
    shown = [im.get_array() for ax in fig.axes for im in ax.get_images()]
    assert len(shown) == 4 and all((im == 200).all() for im in shown)
