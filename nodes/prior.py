"""The prior that keeps tail rows near those of the empty prompt."""

from __future__ import annotations

from comfy_api.latest import io

from ..kernels.losses import NullTextPrior
from .types import LossTerm


class AtelierNullTextPrior(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AtelierNullTextPrior",
            display_name="Null-Text Prior (HiFi Tuner)",
            category="Concept Atelier/Train",
            description="Keeps a concept of tail rows near what the model reads where a prompt says nothing, so that "
            "it does not overfit to its few pictures.",
            search_aliases=["HiFi Tuner", "regularization", "prior", "tail rows"],
            inputs=[
                io.Float.Input(
                    "weight",
                    default=1e-5,
                    min=0.0,
                    max=1000.0,
                    step=1e-6,
                    round=False,
                    tooltip="w_s of HiFi Tuner Eq. 6, with the sum of squares over rows and channels. The paper does "
                    "not give it: choose it so that 'prior : denoising' on Train Concept ends between 0.01 and 0.1.",
                ),
            ],
            outputs=[LossTerm.Output(display_name="loss_term", tooltip="For loss_terms of Train Concept.")],
        )

    @classmethod
    def execute(cls, weight: float) -> io.NodeOutput:
        return io.NodeOutput(NullTextPrior(weight))


NODES = [AtelierNullTextPrior]
