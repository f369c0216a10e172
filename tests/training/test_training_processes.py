from __future__ import annotations

import pytest

from xmag_hf.training.processes import TrainingError, open_accelerator


def test_accelerate_s_own_accumulation_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(TrainingError, match="say 3 gradient accumulation steps, the options 8"):
        open_accelerator("no", 8, cpu=True)
    assert open_accelerator("no", 3, cpu=True).gradient_accumulation_steps == 3
