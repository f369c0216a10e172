"""`xmag e2e`: exit codes and messages; what it computes is tested in tests/mil."""

from pathlib import Path

import pytest

from xmag_hf.cli.main import main


def test_help_shows_every_default(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["e2e", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for told in ("--frozen-stages", "--kept-type", "--tissue", "--slides-csv", "xmag e2e slides/"):
        assert told in text
    assert "--pooling" not in text and "--precision" not in text  # of bags, which e2e has none of


@pytest.mark.parametrize(
    ("extra", "code", "told"),
    [
        (["--epochs", "0"], 2, "--epochs=0: it must be above 0"),
        (["--tissue", "3"], 2, "tissue=3.0"),
        (["--labels", "none.csv"], 1, "none.csv"),
        (["--encoder", "random:huge"], 1, "random:SIZE"),
    ],
)
def test_wrong_usage_and_missing_input_differ(
    extra: list[str], code: int, told: str, cmu_slide: Path, tmp_path: Path, capsys
) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("slide_id,patient_id,label\nCMU-1-Small-Region,p,a\nother,q,b\n")
    command = ["e2e", str(cmu_slide), "--labels", str(labels), "--encoder", "random:tiny"]
    command += ["--out", str(tmp_path / "study"), *extra]
    if code == 2:
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
    else:
        assert main(command) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
