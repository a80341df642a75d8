"""ADI as a diffusers user would write it down from the paper (arXiv 2311.15841, section 4): the other side of speed.py.

Three passes a step, one for each picture of the triple, each with its own encoding of all per-layer prompts; the whole
token-embedding matrix is the trained parameter, rows that are not the identifier's are put back afterwards, and no
weight is frozen. It shares no code with kernels/, so that it also checks the update of the training loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


class PerLayerContext:
    """Attention processor of cross-attention layer `index`: reads contexts[index] in place of the common context."""

    def __init__(self, index: int, contexts: list[Tensor]) -> None:
        self.index = index
        self.contexts = contexts

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = self.contexts[self.index]
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class PlainADI:
    """The identifier is one new token for each cross-attention layer, in a matrix of embeddings that all train."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        init_word: str,
        beta: float,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """init_word: one piece, whose embedding every layer's token starts from. The models are changed in place."""
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        self.beta = beta
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.contexts: list[Tensor] = []
        # Modules in order of execution: down, middle, up.
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        attentions = [m.attn2 for block in blocks for m in block.modules() if hasattr(m, "attn2")]
        for index, attention in enumerate(attentions):
            attention.set_processor(PerLayerContext(index, self.contexts))

        known = text_encoder.get_input_embeddings().num_embeddings
        text_encoder.resize_token_embeddings(known + len(attentions), mean_resizing=False)
        self.embedding = text_encoder.get_input_embeddings()
        self.token_ids = torch.arange(known, known + len(attentions), device=self.embedding.weight.device)
        (word,) = tokenizer(init_word, add_special_tokens=False).input_ids
        with torch.no_grad():
            self.embedding.weight[self.token_ids] = self.embedding.weight[word].clone()
        unet.requires_grad_(True)
        text_encoder.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.embedding.parameters(), lr=learning_rate, weight_decay=weight_decay)

    @property
    def vectors(self) -> Tensor:
        """(L, d), the identifier's embedding for each layer."""
        return self.embedding.weight.detach()[self.token_ids]

    def prompt_ids(self, caption: str) -> Tensor:
        """(L, T) token ids: the caption with the token of each layer at its blank {}."""
        before, after = (self.tokenizer(part, add_special_tokens=False).input_ids for part in caption.split("{}"))
        bos, eos, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        room = self.text_encoder.config.max_position_embeddings
        prompts = [[bos, *before, token, *after, eos] for token in self.token_ids.tolist()]
        ids = [prompt + [pad] * (room - len(prompt)) for prompt in prompts]
        return torch.tensor(ids, device=self.token_ids.device)

    def gradient(self, caption: str, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """(L, d) gradient of the denoising loss (Eq. 1) of one picture (1, C, h, w)."""
        hidden = self.text_encoder(self.prompt_ids(caption)).last_hidden_state.to(self.unet.dtype)
        self.contexts[:] = hidden.unsqueeze(1)
        x_t = self.scheduler.add_noise(latents, eps, t).to(self.unet.dtype)
        eps_hat = self.unet(x_t, t, hidden[:1]).sample.float()
        F.mse_loss(eps_hat, eps).backward()
        gradient = self.embedding.weight.grad[self.token_ids].clone()
        self.unet.zero_grad()
        self.text_encoder.zero_grad()
        return gradient

    def step(self, caption: str, latents: Tensor, t: Tensor, eps: Tensor) -> None:
        """One update from a triple: anchor, context-different, action-different picture.

        caption: of the anchor. latents, eps: (3, C, h, w). t: (3,).
        """
        anchor, context, action = (
            self.gradient(caption, latents[i : i + 1], t[i : i + 1], eps[i : i + 1]) for i in range(3)
        )
        masked = round(self.beta * anchor.shape[-1])
        by_context = (anchor - context).abs()
        gamma = by_context.sort(dim=-1, descending=True).values[:, masked - 1, None]
        by_action = (anchor - action).abs()
        lam = by_action.sort(dim=-1).values[:, masked, None]
        mask = (by_context < gamma) & (by_action >= lam)

        before = self.embedding.weight.detach().clone()
        self.embedding.weight.grad = torch.zeros_like(self.embedding.weight)
        self.embedding.weight.grad[self.token_ids] = mask * anchor
        self.optimizer.step()
        self.optimizer.zero_grad()
        others = torch.ones(len(before), dtype=torch.bool, device=before.device)
        others[self.token_ids] = False
        with torch.no_grad():
            self.embedding.weight[others] = before[others]
