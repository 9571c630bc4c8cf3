"""Attribute accuracy: the share of the attributes that a prompt names which a classifier finds in the image.

A model's folder may hold two files beside model_index.json. `attributes.json` has the values of each attribute with the
phrases that name them in a prompt, and `attributes.safetensors` the weights of a classifier of these attributes. The
embedded model has them; for a model without them there is no attribute accuracy.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sglang_gen.errors import LOADING_ERRORS, InvalidValueError, UserError, in_our_words
from sglang_gen.perf import agreement
from sglang_gen.types import ModelCard

if TYPE_CHECKING:
    import numpy as np

    from sglang_gen.perf.attribute_classifier import Classifier

    Frame = np.ndarray[Any, np.dtype[np.uint8]]

VOCABULARY_FILE, CLASSIFIER_FILE = "attributes.json", "attributes.safetensors"
ACCURACY, REFERENCE_ACCURACY = "attribute_accuracy", "reference_attribute_accuracy"  # of the dump and its samples


@dataclass(frozen=True)
class Vocabulary:
    """The values of each attribute, in the order of the classifier's classes, and what each phrase names.

    `size` is the height and width of the classifier's input, `width` the number of channels of its first layer.
    """

    values: Mapping[str, tuple[str, ...]]
    phrases: Mapping[str, tuple[str, str]]  # phrase in lower case -> attribute and value
    size: int
    width: int

    def named(self, prompt: str) -> dict[str, str]:
        """Attribute -> value in `prompt`. Attributes with several values there ("lake or river") are left out.

        Phrases match whole words, in any case. Where phrases overlap, the first one counts, and of those that begin at
        one word the longest: "clear lake" names no clear sky.
        """
        longest_first = sorted(self.phrases, key=len, reverse=True)
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
        found: dict[str, set[str]] = {}
        for phrase in re.findall(pattern, " ".join(prompt.lower().split())):
            attribute, value = self.phrases[phrase]
            found.setdefault(attribute, set()).add(value)
        return {name: next(iter(found[name])) for name in self.values if len(found.get(name, ())) == 1}


@dataclass(frozen=True)
class Attributes:
    """A vocabulary and its classifier."""

    vocabulary: Vocabulary
    classifier: "Classifier"

    def classes(self, frames: Sequence["Frame"]) -> "np.ndarray[Any, Any]":
        """Class indices [N, attributes] of images [H, W, 3], which are resized to the classifier's input."""
        import numpy as np

        from sglang_gen.perf.attribute_classifier import classify

        return classify(self.classifier, np.stack([_resized(frame, self.vocabulary.size) for frame in frames]))

    def find(self, frames: Sequence["Frame"]) -> list[dict[str, str]]:
        """Attribute -> value of each image."""
        known = self.vocabulary.values.items()
        return [
            {name: values[index] for (name, values), index in zip(known, row, strict=True)}
            for row in self.classes(frames).tolist()
        ]

    def measure(
        self, entries: Sequence[dict[str, Any]], frames: Sequence["Frame"], references: Sequence["Frame"] | None
    ) -> dict[str, Any]:
        """Add to the entry of each image the attributes that its prompt names, those found, and the accuracy.

        Returns the entries of the report: `attribute_accuracy`, the mean over the images whose prompts name an
        attribute, with references `reference_attribute_accuracy`, and `attributes`: the number of `images`, the number
        `left_out`, whose prompts name none, and the accuracy `by_attribute`. The means are None if all are left out.
        """
        for entry, found in zip(entries, self.find(frames), strict=True):
            entry["attributes"] = {"named": self.vocabulary.named(str(entry["prompt"])), "found": found}
            entry[ACCURACY] = _accuracy(entry["attributes"])
        if references is not None:
            for entry, found in zip(entries, self.find(references), strict=True):
                compared = {"named": entry["attributes"]["named"], "found": found}
                entry["attributes"]["reference"] = found
                entry[REFERENCE_ACCURACY] = _accuracy(compared)
        judged = [entry for entry in entries if entry[ACCURACY] is not None]
        kept = [ACCURACY] if references is None else [ACCURACY, REFERENCE_ACCURACY]
        return {
            **{name: round(fmean(entry[name] for entry in judged), 6) if judged else None for name in kept},
            "attributes": {
                "images": len(judged),
                "left_out": len(entries) - len(judged),
                "by_attribute": {name: row for name in self.vocabulary.values if (row := _of_attribute(name, judged))},
            },
        }


def summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of the accuracy over the images whose prompts name an attribute, like that of a metric."""
    judged = [entry for entry in entries if entry[ACCURACY] is not None]
    others = [entry[REFERENCE_ACCURACY] for entry in judged] if judged and REFERENCE_ACCURACY in judged[0] else None
    return agreement.compared_summary([entry[ACCURACY] for entry in judged], others, judged, higher_is_better=True)


def sentence(report: Mapping[str, Any]) -> str:
    """The attribute accuracy in the entry `quality` of a dump as a phrase for the log."""
    counts, one = report["attributes"], report["summary"][ACCURACY]
    left = counts["left_out"]
    without = f"{left} {'image' if left == 1 else 'images'} left out, whose prompts name none" if left else ""
    if not counts["images"]:
        return f"none, since no prompt names an attribute of the classifier ({without})"
    text = f"{percent(one['mean'])}{_error(one['standard_error'])}"
    if "difference" in one:
        text += (
            f", the reference {percent(one['reference_mean'])}, paired difference "
            f"{100 * one['difference']:+.3g}{_error(one['difference_error'])}"
        )
    return text + (f" ({without})" if left else "")


def percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {100 * value:.2g}"


def _accuracy(attributes: Mapping[str, Mapping[str, str]]) -> float | None:
    """The share of the named attributes that were found; None if none is named."""
    named, found = attributes["named"], attributes["found"]
    return round(fmean(found[name] == value for name, value in named.items()), 6) if named else None


def _of_attribute(name: str, entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The accuracy of one attribute over the images whose prompts name it; empty if none does."""
    own = [entry["attributes"] for entry in entries if name in entry["attributes"]["named"]]
    sides = {"accuracy": "found", "reference_accuracy": "reference"}
    shares = {
        field: round(fmean(entry[side][name] == entry["named"][name] for entry in own), 6)
        for field, side in sides.items()
        if own and side in own[0]
    }
    return {"images": len(own), **shares} if own else {}


def _resized(frame: "Frame", size: int) -> "Frame":
    import numpy as np
    from PIL import Image

    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))


def folder_in(card: ModelCard) -> Path | None:
    """The folder of a model that has attributes; None if it has none.

    A card that was read without weights names the folders of its components alone.
    """
    beside = [component.folder.parent for component in card.components.values() if component.folder is not None]
    folders = beside if card.folder is None else [card.folder]
    return next((folder for folder in folders if (folder / VOCABULARY_FILE).is_file()), None)


def load(folder: Path) -> Attributes:
    """The attributes in a model's folder. Raises UserError for files that do not fit together."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from sglang_gen.perf.attribute_classifier import Classifier

    vocabulary, path = read_vocabulary(folder / VOCABULARY_FILE), folder / CLASSIFIER_FILE
    try:
        network = Classifier([len(values) for values in vocabulary.values.values()], vocabulary.width)
        network.load_state_dict(load_file(path))
    except (*LOADING_ERRORS, SafetensorError) as error:
        raise UserError(
            f"{path} is not the classifier that {VOCABULARY_FILE} beside it describes: {in_our_words(error)}; remove "
            "both files, or copy them from the model again"
        ) from error
    return Attributes(vocabulary, network.eval())


def read_vocabulary(path: Path) -> Vocabulary:
    """Raises UserError for a file that is not a vocabulary."""
    try:
        return _vocabulary(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = in_our_words(error) if isinstance(error, (OSError, ValueError)) else "its layout is another"
        raise UserError(f"{path} is not the vocabulary of a classifier: {reason}") from error


def _vocabulary(content: Mapping[str, Any]) -> Vocabulary:
    phrases: dict[str, tuple[str, str]] = {}
    for attribute, values in content["attributes"].items():
        for value, words in values.items():
            for phrase in words:
                if phrases.setdefault(phrase.lower(), (attribute, value)) != (attribute, value):
                    raise InvalidValueError(f"the phrase '{phrase}' names two values")
    size, width = content["size"], content["width"]
    if not phrases or not all(isinstance(number, int) and number > 0 for number in (size, width)):
        raise InvalidValueError("it has no phrases, or 'size' or 'width' is not a positive integer")
    return Vocabulary({name: tuple(values) for name, values in content["attributes"].items()}, phrases, size, width)
