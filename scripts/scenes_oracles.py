"""What simple answers score on the phrases of scenes: the numbers to read a model's beside.

    python scripts/scenes_oracles.py [--count 240]

Rows: *best proposal* is given the truth and picks the best of the masks that a perfect blind proposer would make, one for each
thing and each stuff (a ceiling for class-agnostic instance proposals); *colour threshold* answers with all pixels near the
colour that the phrase names; *all things* and *same colour* ignore the rest of the phrase; *majority* answers every phrase of a
kind with the commonest stuff or thing; *no relation* reads "the circle left of the square" as "circle".
IoU over present phrases; the last column is the share of absent phrases answered with nothing.
"""

import argparse

import numpy as np

from pmpseg.data.scene_drawing import COLOURS, STUFF, Scene
from pmpseg.data.scene_phrases import GROUPS, PHRASE_KINDS, Phrase
from pmpseg.data.scenes import SceneDataset, Scenes


def best_proposal(scene: Scene, phrase: Phrase, truth: np.ndarray) -> np.ndarray:
    masks = [scene.owner == i + 1 for i in range(len(scene.things))]
    masks += [(scene.stuff == s) & (scene.owner == 0) for s in np.unique(scene.stuff)]
    return max(masks, key=lambda m: iou(m, truth)) if truth.any() else np.zeros_like(truth)


def colour_threshold(scene: Scene, phrase: Phrase, truth: np.ndarray) -> np.ndarray:
    if phrase.target.colour is None:
        return scene.owner > 0
    distance = np.abs(scene.image.astype(int) - COLOURS[phrase.target.colour]).max(-1)
    return distance < 48


def all_things(scene: Scene, phrase: Phrase, truth: np.ndarray) -> np.ndarray:
    return scene.owner > 0


def same_colour(scene: Scene, phrase: Phrase, truth: np.ndarray) -> np.ndarray:
    same = [0] + [phrase.target.colour in (None, t.colour) for t in scene.things]
    return np.array(same, bool)[scene.owner]


def majority(scene: Scene, phrase: Phrase, truth: np.ndarray) -> np.ndarray:
    if phrase.kind == "stuff":
        return (scene.stuff == STUFF.index("grass")) & (scene.owner == 0)
    return np.array([0] + [t.shape == "circle" for t in scene.things], bool)[scene.owner]


def no_relation(scene: Scene, phrase: Phrase, truth: np.ndarray) -> np.ndarray:
    return phrase.ignoring_relation(scene) if phrase.kind == "relation" else truth


ANSWERS = (best_proposal, colour_threshold, all_things, same_colour, majority, no_relation)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


def asked(dataset: SceneDataset, index: int) -> list[Phrase]:
    """The phrases of a test item, as structures."""
    scene = dataset.scene(index)
    rng = np.random.default_rng([dataset.seed, index, 0, 1])
    return [phrase for _, phrase, _ in dataset.test_phrases(scene, rng)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=240, help="test scenes")
    count = parser.parse_args().count
    dataset = Scenes(test_length=count).dataset("test")
    columns = (*PHRASE_KINDS, *GROUPS)
    scores = {a.__name__: {c: [] for c in (*columns, "all", "absent")} for a in ANSWERS}
    for index in range(count):
        scene = dataset.scene(index)
        for phrase in asked(dataset, index):
            truth = phrase.mask(scene)
            for answer in ANSWERS:
                row, given = scores[answer.__name__], answer(scene, phrase, truth)
                if truth.any():
                    for column in (phrase.kind, phrase.group, "all"):
                        row[column].append(iou(given, truth))
                else:
                    row["absent"].append(not given.any())
    head = (*columns, "all", "absent")
    print(f"{'':17}" + "".join(f"{c:>12}" for c in head))
    for name, row in scores.items():
        print(f"{name.replace('_', ' '):17}" + "".join(f"{100 * np.mean(row[c]):12.1f}" for c in head))
    print(f"{'phrases':17}" + "".join(f"{len(row[c]):12}" for c in head))


if __name__ == "__main__":
    main()
