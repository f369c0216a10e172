"""The licence chain, against what each licence's own text says."""

from __future__ import annotations

import pytest

from xmag_hf.hub.licences import LICENCES, LicenceError, find_licence, student_licence


@pytest.mark.parametrize("key", [key for key in LICENCES if key.startswith("cc-by")])
def test_creative_commons_rows_agree_with_their_own_names(key):
    """NC, ND and SA are in the name of a Creative Commons licence; the table must not differ."""
    licence = LICENCES[key]
    parts = key.split("-")
    assert licence.commercial is ("nc" not in parts)
    assert licence.derivatives is ("nd" not in parts)
    assert licence.share_alike is ("sa" in parts)
    assert licence.url.endswith(f"/licenses/{'-'.join(parts[1:-1])}/{parts[-1]}/")


@pytest.mark.parametrize(
    "text, name",
    [
        ("CC-BY-NC-ND 4.0", "CC-BY-NC-ND-4.0"),
        ("cc by-nc-nd 4.0", "CC-BY-NC-ND-4.0"),
        ("apache-2.0", "Apache-2.0"),
        ("Owkin non-commercial", "Owkin-non-commercial"),
        ("BSD-3", "BSD-3-Clause"),
        ("CC0", "CC0-1.0"),
    ],
)
def test_spellings(text, name):
    assert find_licence(text).name == name


def test_unknown_licence_allows_nothing_that_it_does_not_say():
    for text in ("house-rules", "", None):
        licence = find_licence(text)
        assert licence.commercial is None and licence.derivatives is None
    assert find_licence("house-rules").name == "house-rules"


def test_permissive_all_the_way_is_apache():
    found = student_licence("Apache-2.0", "Apache-2.0", ["CC0-1.0", "MIT"])
    assert (found.hub_id, found.name, found.commercial) == ("apache-2.0", None, True)
    assert found.open_questions == ()
    assert "Keep this model private" not in found.text
    assert "Keep the notices" in found.text  # Apache-2.0 and MIT ask for it


def test_no_derivatives_teacher_leaves_a_question_open():
    found = student_licence("CC-BY-NC-ND 4.0", "Apache-2.0", ["CC0-1.0"])
    assert (found.hub_id, found.name) == ("other", "non-commercial-see-card")
    assert found.commercial is False
    assert len(found.open_questions) == 1
    assert "not settled" in found.text and "Ask the holder of the teacher's rights" in found.text
    assert "Keep this model private" in found.text
    assert "not legal advice" in found.text
    assert found.summary.startswith("non-commercial (teacher CC-BY-NC-ND-4.0")


def test_one_unknown_input_leaves_all_undetermined():
    found = student_licence("Apache-2.0", "none", [None])
    assert found.commercial is None
    assert (found.hub_id, found.name) == ("other", "see-card")
    assert "undetermined" in found.text
    # An unknown one does not hide one that forbids.
    assert student_licence("CC-BY-NC-4.0", "none", [None]).commercial is False


def test_random_start_brings_no_licence():
    assert "start:" not in student_licence("MIT", "none", ["MIT"]).text
    assert "start:" in student_licence("MIT", None, ["MIT"]).text  # nobody said


def test_share_alike_and_single_non_commercial_are_passed_on():
    assert student_licence("CC-BY-SA-4.0", "MIT", ["MIT"]).hub_id == "cc-by-sa-4.0"
    assert student_licence("CC-BY-NC-4.0", "MIT", ["MIT"]).hub_id == "cc-by-nc-4.0"
    both = student_licence("CC-BY-SA-4.0", "CC-BY-NC-SA-4.0", ["MIT"])
    assert (both.hub_id, both.commercial) == ("other", False)


def test_share_alike_never_hides_a_non_commercial_input():
    found = student_licence("CC-BY-SA-4.0", "MIT", ["CC-BY-NC-4.0"])
    assert found.commercial is False
    assert found.hub_id == "other"


def test_a_student_of_free_inputs_is_itself_a_free_input():
    """As start and as teacher, with the line that its config carries, also twice over."""
    first = student_licence("Apache-2.0", "Apache-2.0", ["MIT"]).summary
    second = student_licence(first, first, ["MIT"])
    for found in (second, student_licence(second.summary, second.summary, ["CC0-1.0"])):
        assert (found.hub_id, found.commercial, found.open_questions) == ("apache-2.0", True, ())
        assert "Keep this model private" not in found.text


def test_what_binds_a_student_binds_the_next():
    """Share-alike is handed on, an open question stays open, and nobody knows more than before."""
    shared = student_licence("CC-BY-SA-4.0", "MIT", ["MIT"]).summary
    found = student_licence(shared, "none", ["MIT"])
    assert (found.hub_id, found.commercial) == ("other", True) and "share-alike" in found.text
    asked = student_licence("CC-BY-ND-4.0", "MIT", ["MIT"]).summary
    assert asked.startswith("no restriction found")
    assert student_licence(asked, "none", ["MIT"]).open_questions
    unknown = student_licence(None, "MIT", ["MIT"]).summary
    assert student_licence(unknown, "none", ["MIT"]).commercial is None


def test_start_that_forbids_changes_is_refused():
    with pytest.raises(LicenceError, match="CC-BY-NC-ND-4.0.*Start from other weights"):
        student_licence("MIT", "CC-BY-NC-ND 4.0", ["MIT"])
