"""Progress bars: on stderr, and not before the first step."""

from __future__ import annotations

from xmag_hf.cli.progress import counting_bars, slides_bar
from xmag_hf.embedding.run import EmbedState


def test_nothing_is_drawn_before_the_first_step(capsys) -> None:
    with counting_bars(quiet=False), slides_bar(quiet=False, counted="patches"):
        pass
    assert capsys.readouterr() == ("", "")


def test_steps_are_drawn_on_stderr(capsys) -> None:
    with counting_bars(quiet=False) as advance:
        advance("epochs", 1, 3)
        advance("epochs", 1, 3)
    out, err = capsys.readouterr()
    assert out == "" and "epochs" in err and "2/3" in err
    with slides_bar(quiet=False, counted="patches") as show:
        show(EmbedState(slides=4, slides_done=1, patches=37, share=1.0))
    out, err = capsys.readouterr()
    assert out == "" and "1/4" in err and "patches 37" in err


def test_quiet_draws_nothing(capsys) -> None:
    with counting_bars(quiet=True) as advance, slides_bar(quiet=True, counted="patches") as show:
        advance("epochs", 1, 3)
        show(EmbedState(slides=4))
    assert capsys.readouterr() == ("", "")
