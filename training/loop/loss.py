"""The loss of the target tokens as a module of its own, so that FSDP sees one forward."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from training.loop.lora_linear import AnswerMask
from training.rows.passes import IGNORE, Pass


class AnswerLoss(nn.Module):
    """A causal language model, wrapped by PEFT, whose forward is the loss of the target tokens. With `mask`, which its
    LoRA layers share, the adapter acts on answers only.
    """

    def __init__(self, model: Any, mask: AnswerMask | None = None) -> None:
        super().__init__()
        self.model = model
        self.mask = mask

    def forward(self, batch: Pass) -> Tensor:
        """Loss of every target token, nats, float32, in the order of the labels. The output layer, a fifth of a
        small model, runs only on the positions before target tokens.
        """
        if self.mask is not None:
            self.mask.acts = batch.acts  # until the next pass, since checkpointed layers compute again backward
        causal = self.model.get_base_model()
        hidden = causal.base_model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            use_cache=False,
            row_lengths=batch.lengths if batch.packed else None,
            shared=batch.shared,
        ).last_hidden_state
        targets = batch.labels[:, 1:]
        is_target = targets != IGNORE
        logits = causal.get_output_embeddings()(hidden[:, :-1][is_target])
        return functional.cross_entropy(logits.float(), targets[is_target], reduction="none")
