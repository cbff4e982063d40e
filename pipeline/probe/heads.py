"""Heads that score a frozen encoder beside the attentive one: linear, and nearest neighbours."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearProbe(nn.Module):
    """Standardised features to class logits.

    Args:
        mean: Per-feature mean over the training clips, [F].
        std: Per-feature standard deviation over the training clips, [F].
        num_classes: Number of classes.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, *, mean: Tensor, std: Tensor, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        # A feature that never varies carries nothing; dividing by its zero would.
        self.register_buffer("scale", torch.where(std > 1e-6, 1 / std.clamp_min(1e-6), 0.0).float())
        self.linear = nn.Linear(mean.shape[0], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features_BF: Tensor) -> Tensor:
        """Logits [B, classes] of features [B, F]."""
        return self.linear((features_BF - self.mean) * self.scale)


def knn_scores(
    train_NF: Tensor,
    labels_N: Tensor,
    query_QF: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
) -> Tensor:
    """Share of the weighted vote that each class gets, [Q, classes].

    Features are centred on the training mean, so that the part common to all clips does not
    decide the cosine; the k nearest then vote with weight exp(cosine / temperature).
    """
    centre_F = train_NF.mean(dim=0)
    train_NF = functional.normalize(train_NF - centre_F, dim=1)
    k = min(k, train_NF.shape[0])
    shares: list[Tensor] = []
    for chunk_QF in query_QF.split(1024):  # bounds the table of cosines, not the result
        cosine_QN = functional.normalize(chunk_QF - centre_F, dim=1) @ train_NF.T
        nearest_Qk, index_Qk = cosine_QN.topk(k, dim=1)
        weight_Qk = (nearest_Qk / temperature).softmax(dim=1)
        votes = torch.zeros(chunk_QF.shape[0], num_classes, device=chunk_QF.device)
        shares.append(votes.scatter_add_(1, labels_N[index_Qk], weight_Qk))
    return torch.cat(shares)
