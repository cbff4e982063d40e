"""What a head says of every clip that it is judged on, and the figures drawn from that."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Shares of clips whose class is the likeliest, or among the five likeliest."""

    top1: float
    top5: float
    num_clips: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outcome:
    """A head's answers, clip by clip."""

    index_N: Tensor
    """Place of each clip in its split."""
    labels_N: Tensor
    predicted_N: Tensor
    truth_N: Tensor
    """What the head gave to the right class; probabilities, or shares of a vote."""
    in_top5_N: Tensor

    @property
    def accuracy(self) -> Accuracy:
        """Shares of right answers; 0 without any clip."""
        num_clips = len(self.labels_N)
        return Accuracy(
            top1=int((self.predicted_N == self.labels_N).sum()) / max(num_clips, 1),
            top5=int(self.in_top5_N.sum()) / max(num_clips, 1),
            num_clips=num_clips,
        )

    def confusion(self) -> list[tuple[int, int, int]]:
        """(class, answer, clips) for every pair that occurs, sorted."""
        pairs_N2 = torch.stack([self.labels_N, self.predicted_N], dim=1)
        found, counts = pairs_N2.unique(dim=0, return_counts=True)
        return [
            (int(truth), int(answer), int(count))
            for (truth, answer), count in zip(found, counts, strict=True)
        ]

    def per_class(self, num_classes: int) -> list[tuple[int, int]]:
        """(clips, right answers) of every class."""
        clips_C = self.labels_N.bincount(minlength=num_classes)
        right = self.labels_N[self.predicted_N == self.labels_N]
        right_C = right.bincount(minlength=num_classes)
        return list(zip(clips_C.tolist(), right_C.tolist(), strict=True))

    def hardest(self, most: int) -> list[tuple[int, int, int, float]]:
        """(place, class, answer, share of the right class) of the clips least understood."""
        order = self.truth_N.argsort(stable=True)[:most]
        return [
            (
                int(self.index_N[row]),
                int(self.labels_N[row]),
                int(self.predicted_N[row]),
                float(self.truth_N[row]),
            )
            for row in order
        ]


def joined(parts: list[Outcome]) -> Outcome:
    """Outcomes of several batches as one."""
    if not parts:
        empty = torch.zeros(0, dtype=torch.int64)
        return Outcome(
            index_N=empty,
            labels_N=empty,
            predicted_N=empty,
            truth_N=torch.zeros(0),
            in_top5_N=torch.zeros(0, dtype=torch.bool),
        )
    names = ("index_N", "labels_N", "predicted_N", "truth_N", "in_top5_N")
    return Outcome(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def of_scores(scores_BC: Tensor, labels_B: Tensor, index_B: Tensor) -> Outcome:
    """The outcome of a batch from its class scores, on the CPU."""
    best_B5 = scores_BC.topk(min(5, scores_BC.shape[1]), dim=1).indices
    labels = labels_B.to(scores_BC.device)
    return Outcome(
        index_N=index_B.cpu(),
        labels_N=labels_B.cpu(),
        predicted_N=best_B5[:, 0].cpu(),
        truth_N=scores_BC.gather(1, labels[:, None])[:, 0].float().cpu(),
        in_top5_N=(best_B5 == labels[:, None]).any(dim=1).cpu(),
    )
