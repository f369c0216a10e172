"""The licence chain: what a student's card says, given the licences of all that went into it.

A table of facts and one rule. The rule is cautious and says where it does not know: whether weights
trained on a model's outputs are a derivative of that model is not settled, and this is no legal
advice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

DISTILLED = (
    "Whether weights trained on a model's outputs are a derivative work of that model is not "
    "settled. Nothing here decides it."
)


class LicenceError(ValueError):
    """Terms that forbid what was asked; the message names them and the remedy."""


@dataclass(frozen=True)
class Licence:
    """What a licence asks, as far as this matters for weights made with its material.

    Attributes:
        name: As people write it.
        hub_id: Identifier in the Hub's `license` metadata; `other` where it has none.
        commercial: Whether commercial use is allowed; None where we do not know.
        derivatives: Whether changed versions may be shared; None where we do not know.
        share_alike: Whether changed versions keep the same licence.
        attribution: Whether the notice or the authors must be named.
        url: Its text, or '' if the rights holder's page is the only source.
    """

    name: str
    hub_id: str
    commercial: bool | None
    derivatives: bool | None
    share_alike: bool
    attribution: bool
    url: str


_CC = "https://creativecommons.org/licenses"
LICENCES = {
    licence.name.lower(): licence
    for licence in (
        Licence("Apache-2.0", "apache-2.0", True, True, False, True,
                "https://www.apache.org/licenses/LICENSE-2.0"),
        Licence("MIT", "mit", True, True, False, True, "https://opensource.org/license/mit"),
        Licence("BSD-3-Clause", "bsd-3-clause", True, True, False, True,
                "https://opensource.org/license/bsd-3-clause"),
        Licence("CC0-1.0", "cc0-1.0", True, True, False, False,
                "https://creativecommons.org/publicdomain/zero/1.0/"),
        Licence("CC-BY-3.0", "cc-by-3.0", True, True, False, True, f"{_CC}/by/3.0/"),
        Licence("CC-BY-4.0", "cc-by-4.0", True, True, False, True, f"{_CC}/by/4.0/"),
        Licence("CC-BY-SA-4.0", "cc-by-sa-4.0", True, True, True, True, f"{_CC}/by-sa/4.0/"),
        Licence("CC-BY-NC-4.0", "cc-by-nc-4.0", False, True, False, True, f"{_CC}/by-nc/4.0/"),
        Licence("CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0", False, True, True, True,
                f"{_CC}/by-nc-sa/4.0/"),
        Licence("CC-BY-ND-4.0", "cc-by-nd-4.0", True, False, False, True, f"{_CC}/by-nd/4.0/"),
        Licence("CC-BY-NC-ND-4.0", "cc-by-nc-nd-4.0", False, False, False, True,
                f"{_CC}/by-nc-nd/4.0/"),
        Licence("PolyForm-Noncommercial-1.0.0", "other", False, True, False, True,
                "https://polyformproject.org/licenses/noncommercial/1.0.0"),
        Licence("Owkin-non-commercial", "other", False, None, False, True,
                "https://huggingface.co/owkin/phikon"),
        Licence("Research-use-only", "other", False, None, False, True, ""),
    )
}  # fmt: skip
ASK = "; see the card"  # in a summary: there are open questions
# Other spellings, after _key.
ALIASES = {
    "cc0": "cc0-1.0",
    "bsd-3": "bsd-3-clause",
    "apache-2": "apache-2.0",
    "apache-license-2.0": "apache-2.0",
    "polyform-noncommercial": "polyform-noncommercial-1.0.0",
    "owkin-non-commercial-licence": "owkin-non-commercial",
    "owkin-non-commercial-license": "owkin-non-commercial",
}


@dataclass(frozen=True)
class StudentLicence:
    """What follows for a student.

    Attributes:
        hub_id: For the card's `license` metadata.
        name: For `license_name` where `hub_id` is `other`, else None.
        commercial: False where an input forbids it, None where an input is unknown.
        open_questions: What the rights holders have to be asked before publishing; may be empty.
        summary: One line, for a config field.
        text: Markdown list for the card: each input, then what follows.
    """

    hub_id: str
    name: str | None
    commercial: bool | None
    open_questions: tuple[str, ...]
    summary: str
    text: str


def find_licence(text: str | None) -> Licence:
    """Look up a licence as people write it (`CC-BY-NC-ND 4.0`, `apache-2.0`).

    Args:
        text: As a page, table or user gives it; None and '' mean that nobody said.

    Returns:
        The row of `LICENCES`; for one that is not there, a row whose permissions are None.
    """
    said = text or ""
    if said.startswith("non-commercial"):  # what `StudentLicence.summary` says of one
        return Licence(said, "other", False, None, False, True, "")
    if said.startswith("no restriction found ("):  # likewise
        shares = any(row.name in said for row in LICENCES.values() if row.share_alike)
        return Licence(said, "other", True, None if ASK in said else True, shares, True, "")
    key = _key(text or "")
    known = LICENCES.get(ALIASES.get(key, key))
    return known or Licence(text or "not stated", "other", None, None, False, True, "")


def student_licence(
    teacher_licence: str | None, start_licence: str | None, corpus_licences: Sequence[str | None]
) -> StudentLicence:
    """Work out what a card may say about a student's licence.

    The rule: an input that forbids commercial use makes the student non-commercial; one that is
    unknown leaves it undetermined. The start is different from the teacher: the student's weights
    are a changed version of the start's without any doubt, while for the teacher (whose outputs are
    the targets) and the slides that is an open question, which is put on the card.

    Args:
        teacher_licence: Of the teacher's weights.
        start_licence: Of the weights that the student started from; `none` for random ones.
        corpus_licences: Of the slides, one or more.

    Returns:
        Metadata and text. Apache-2.0 (this package's own) only if nothing stands against it.

    Raises:
        LicenceError: The start forbids changed versions, so the student may not be shared at all.
    """
    inputs = [("teacher", find_licence(teacher_licence))]
    if (start_licence or "").lower() != "none":
        start = find_licence(start_licence)
        if start.derivatives is False:
            raise LicenceError(
                f"Start under {start.name}: it forbids sharing changed versions, and a student is "
                "one. Start from other weights (--init)."
            )
        inputs.append(("start", start))
    corpora = dict.fromkeys(map(find_licence, corpus_licences or [None]))
    inputs += [("slides", licence) for licence in corpora]

    questions = tuple(filter(None, (_question(role, licence) for role, licence in inputs)))
    commercial = _commercial([licence for _, licence in inputs])
    hub_id, name = _metadata(inputs, commercial, questions)
    parts = ", ".join(f"{role} {licence.name}" for role, licence in inputs)
    verdict = {True: "no restriction found", False: "non-commercial", None: "undetermined"}
    summary = f"{verdict[commercial]} ({parts}{ASK if questions else ''})"
    text = _text(inputs, commercial, questions, hub_id)
    return StudentLicence(hub_id, name, commercial, questions, summary, text)


def _key(text: str) -> str:
    """`CC BY-NC-ND 4.0` -> `cc-by-nc-nd-4.0`."""
    return re.sub(r"[\s_]+", "-", text.strip().lower())


def _commercial(licences: Sequence[Licence]) -> bool | None:
    allowed = [licence.commercial for licence in licences]
    if False in allowed:
        return False
    return None if None in allowed else True


def _question(role: str, licence: Licence) -> str | None:
    """What has to be asked about one input before the weights go out."""
    holder = f"the holder of the {role}'s rights"
    if licence.derivatives is False:
        return f"{role}: {licence.name} forbids sharing changed versions. {DISTILLED} Ask {holder}."
    if licence.derivatives is None or licence.commercial is None:
        return f"{role}: read the terms ({licence.name}), or ask {holder}, before publishing."
    return None


def _metadata(
    inputs: Sequence[tuple[str, Licence]], commercial: bool | None, questions: Sequence[str]
) -> tuple[str, str | None]:
    """(`license`, `license_name`) of the card."""
    name = "non-commercial-see-card" if commercial is False else "see-card"
    if questions or commercial is None:
        return "other", name
    binding = {
        licence.hub_id
        for _, licence in inputs
        if licence.share_alike or licence.commercial is False
    }
    if not binding:
        return "apache-2.0", None
    # One binding licence can be passed on; several cannot be merged by software.
    if len(binding) > 1 or "other" in binding:
        return "other", name
    return binding.pop(), None


def _text(
    inputs: Sequence[tuple[str, Licence]],
    commercial: bool | None,
    questions: Sequence[str],
    hub_id: str,
) -> str:
    lines = []
    for role, licence in inputs:
        link = f"[{licence.name}]({licence.url})" if licence.url else licence.name
        lines.append(f"- {role}: {link}")
    if commercial is False:
        lines.append(
            "- What follows: treat it as **non-commercial**, since an input forbids such use."
        )
    elif commercial is None:
        lines.append("- What follows: **undetermined**, since the terms of an input are not known.")
    else:
        lines.append("- What follows: no input forbids commercial use.")
    if any(licence.attribution for _, licence in inputs):
        lines.append("- Keep the notices of the inputs, and name their authors.")
    if any(licence.share_alike for _, licence in inputs):
        lines.append("- An input asks that changed versions keep its licence (share-alike).")
    lines += [f"- **Open question**: {question}" for question in questions]
    if questions:
        lines.append("- Keep this model private until the open questions are answered.")
    elif hub_id == "apache-2.0":
        lines.append("- These weights: Apache-2.0, unless whoever trained them says otherwise.")
    lines.append("- This list is made from a table by software. It is not legal advice.")
    return "\n".join(lines)
