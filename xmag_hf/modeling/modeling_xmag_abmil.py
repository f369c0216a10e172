"""Slide-level heads on bags of patch embeddings: gated attention (ABMIL), and mean pooling.

Ilse et al. 2018, "Attention-based deep multiple instance learning" (arXiv:1802.04712), Eq. 9, with
the linear layer before it that the field uses on frozen embeddings.

Travels to the Hub with the weights: imports torch, transformers and siblings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_xmag_abmil import XMAGABMILConfig, XMAGMeanPoolConfig, XMAGSlideHeadConfig


@dataclass
class SlideOutput(ModelOutput):
    """What a slide-level model returns.

    Attributes:
        loss: Scalar, float32, in nats; None without labels.
        logits: (B, C), before softmax.
        attentions: (B, M), float32, 0 or more, sum 1 over the instances of a bag, 0 on padding.
        slide_embedding: (B, H).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attentions: Tensor | None = None
    slide_embedding: Tensor | None = None


class XMAGSlideHeadPreTrainedModel(PreTrainedModel):
    """Xavier initialisation, as the field trains these heads; the rest is transformers'."""

    config: XMAGSlideHeadConfig
    config_class = XMAGSlideHeadConfig
    base_model_prefix = "head"
    main_input_name = "features"
    _supports_sdpa = True  # no attention among tokens: any implementation of it will do

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # Embeddings are small numbers: transformers' fixed 0.02 would start with gates that
            # are all half open and an attention that hardly moves.
            init.xavier_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)


class XMAGABMILModel(XMAGSlideHeadPreTrainedModel):
    """Gated attention over the patches of a slide.

    With embeddings x_k (D) of a bag: h_k = dropout(relu(W x_k + b)) (H),
    a_k = softmax_k(w . (tanh(V h_k + v) * sigmoid(U h_k + u)) + c), z = sum_k a_k h_k (H), and
    logits = classifier(z) (C).
    """

    config_class = XMAGABMILConfig
    _auto_class = "AutoModel"

    def __init__(self, config: XMAGABMILConfig):
        super().__init__(config)
        hidden, width = config.hidden_dim, config.attention_dim
        self.projection = nn.Linear(config.embed_dim, hidden)
        # V and U in one product of twice the width: as they are, they leave cores waiting.
        self.attention_gates = nn.Linear(hidden, 2 * width)
        self.attention_score = nn.Linear(width, 1)
        self.classifier = nn.Linear(hidden, config.num_labels or 0)
        self.post_init()

    @can_return_tuple
    def forward(
        self, features: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SlideOutput:
        """Classify bags.

        Args:
            features: (B, M, D) float; what stands in padding does not matter, NaN included.
            mask: (B, M) bool, True on instances; None if all are.
            labels: (B,) int64 classes.

        Returns:
            `SlideOutput`. The loss is the mean over the bags of the batch of the label's class
            weight times its cross-entropy. It is not divided by the weights of the batch, as
            torch's weighted mean is: with one bag a batch the weights would cancel.

        Raises:
            ValueError: Shapes that do not fit, or a bag without instances.
        """
        mask = check_bags(features, mask, self.config.embed_dim)
        if mask is not None:
            features = features.masked_fill(~mask[..., None], 0.0)
        hidden = self.projection(features).relu()  # (B, M, H)
        hidden = drop(hidden, self.config.dropout, self.training)
        value, gate = self.attention_gates(hidden).chunk(2, dim=-1)  # (B, M, A) each
        attention_logits = self.attention_score(value.tanh() * gate.sigmoid()).squeeze(-1)
        attention_logits = attention_logits.float()  # (B, M); bags are long, bf16 has 8 bits
        if mask is not None:
            attention_logits = attention_logits.masked_fill(~mask, -torch.inf)
        attentions = attention_logits.softmax(dim=1)
        pooled = torch.bmm(attentions.to(hidden.dtype)[:, None], hidden)[:, 0]  # (B, H)
        logits = self.classifier(pooled)
        return SlideOutput(
            slide_loss(logits, labels, self.config.class_weights), logits, attentions, pooled
        )


class XMAGMeanPoolModel(XMAGSlideHeadPreTrainedModel):
    """The baseline: the mean of a bag through a network with one hidden layer."""

    config_class = XMAGMeanPoolConfig
    _auto_class = "AutoModel"

    def __init__(self, config: XMAGMeanPoolConfig):
        super().__init__(config)
        self.projection = nn.Linear(config.embed_dim, config.hidden_dim)
        self.classifier = nn.Linear(config.hidden_dim, config.num_labels or 0)
        self.post_init()

    @can_return_tuple
    def forward(
        self, features: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SlideOutput:
        """Classify bags; see `XMAGABMILModel.forward`.

        Args:
            features: (B, M, D) float.
            mask: (B, M) bool, True on instances; None if all are.
            labels: (B,) int64 classes.

        Returns:
            `SlideOutput`; attentions are 1 over the number of instances.

        Raises:
            ValueError: Shapes that do not fit, or a bag without instances.
        """
        mask = check_bags(features, mask, self.config.embed_dim)
        if mask is None:
            attentions = features.new_full(features.shape[:2], 1 / features.shape[1]).float()
            mean = features.mean(dim=1)  # (B, D)
        else:
            attentions = mask.float() / mask.sum(dim=1, keepdim=True)
            whole = features.masked_fill(~mask[..., None], 0.0)
            mean = torch.bmm(attentions.to(whole.dtype)[:, None], whole)[:, 0]  # (B, D)
        embedding = self.projection(mean).relu()  # (B, H)
        logits = self.classifier(drop(embedding, self.config.dropout, self.training))
        return SlideOutput(
            slide_loss(logits, labels, self.config.class_weights), logits, attentions, embedding
        )


def drop(hidden: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout, in training.

    From uniform numbers, since torch's own on a CPU draws from a Bernoulli, which is several times
    slower: a sixth of a step's time.

    Args:
        hidden: Any shape.
        rate: Share of elements set to 0; the others are divided by 1 - rate.
        training: Otherwise nothing is done.

    Returns:
        The same shape.
    """
    if not training or not rate:
        return hidden
    kept = torch.rand(hidden.shape, device=hidden.device).ge_(rate).mul_(1 / (1 - rate))
    return hidden * kept.to(hidden.dtype)


def check_bags(features: Tensor, mask: Tensor | None, embed_dim: int) -> Tensor | None:
    """Refuse bags that a head cannot take.

    Args:
        features: To be (B, M, embed_dim), M > 0.
        mask: To be (B, M) bool with an instance in every bag; None if all are instances.
        embed_dim: The head's.

    Returns:
        The mask.

    Raises:
        ValueError: What does not fit, and what would.
    """
    if features.ndim != 3 or features.shape[2] != embed_dim or not features.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)}: this head takes (bags, patches, {embed_dim}) with "
            "at least one patch."
        )
    if mask is None:
        return None
    if mask.shape != features.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask {tuple(mask.shape)} {mask.dtype}: give bool {tuple(features.shape[:2])}, True "
            "on patches and False on padding."
        )
    if not bool(mask.any(dim=1).all()):
        empty = int((~mask.any(dim=1)).nonzero()[0])
        raise ValueError(f"mask: bag {empty} of the batch has no patches. Leave it out.")
    return mask


def slide_loss(
    logits: Tensor, labels: Tensor | None, class_weights: list[float] | None
) -> Tensor | None:
    """Mean over bags of weight times cross-entropy; None without labels.

    Args:
        logits: (B, C).
        labels: (B,) int64.
        class_weights: C numbers, or None for 1 each.

    Returns:
        Scalar, float32, in nats.
    """
    if labels is None:
        return None
    weight = None
    if class_weights is not None:
        weight = torch.tensor(class_weights, dtype=torch.float32, device=logits.device)
    losses = nn.functional.cross_entropy(logits.float(), labels, weight, reduction="none")
    return losses.mean()
