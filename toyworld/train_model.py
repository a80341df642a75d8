"""Train the U-Net and the text encoder together on the cached latents."""

import copy
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import distributed

from .autoencoder import PatchAutoencoder
from .copy_start import start_as_copy
from .dataset import HELD_OUT_SEED, PICTURES, RUNS
from .evaluate import prompt_scenes, readings
from .judge import load_judge
from .model import (
    SCHEDULER,
    TOKENIZER_FOLDER,
    TRAIN_STEPS,
    ToyModel,
    build_text_encoder,
    build_unet,
    load_text_encoder_state,
    text_encoder_state,
)
from .render import picture_grid
from .sampling import sample
from .tokenizer import load_tokenizer
from .train_checkpoint import Checkpoint
from .training_set import TrainingSet, prepare_training_set
from .vocabulary import caption
from .weights import AUTOENCODER, JUDGE, TEXT_ENCODER, UNET, WEIGHTS, read_weights, save_weights

BATCH = 16
LEARNING_RATE = 1e-3
# For weights that can draw already.
CONTINUED_LEARNING_RATE = 6e-4
WARM_UP_STEPS = 200
# The learning rate stays at its peak for this share of the budget, then falls as a cosine.
PEAK_SHARE = 0.25
EMPTY_CAPTIONS = 0.1
WITHOUT_BACKGROUND = 0.15
MAX_WEIGHT = 16.0
EMBEDDING_STD = 0.1
AVERAGE_EVERY = 4
EMA_EVERY = 5
GRID_SECONDS = 600
GRID_PROMPTS = 192
GRID_SEED = HELD_OUT_SEED + 3
CURVE = RUNS / "curve.jsonl"
TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"
_ALPHAS = DDIMScheduler(**SCHEDULER).alphas_cumprod


class ModelTraining:
    """The trained parts with their optimizer, moving average and clock; all of it is in the checkpoint."""

    def __init__(self, minutes: float, seed: int, device: str, start_from: Path | None):
        torch.manual_seed(seed)
        self.device = device
        self.peak = CONTINUED_LEARNING_RATE if start_from else LEARNING_RATE
        self.tokenizer = load_tokenizer(WEIGHTS / TOKENIZER_FOLDER)
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(self.tokenizer)
        start_as_copy(self.unet)
        # A larger start than transformers' lets the words tell the pictures apart sooner.
        for module in self.text_encoder.modules():
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=EMBEDDING_STD)
        if start_from:
            self._take_over(start_from)
        self.unet.to(device, memory_format=torch.channels_last)
        self.text_encoder.to(device)
        self.average = (copy.deepcopy(self.unet).eval(), copy.deepcopy(self.text_encoder).eval())
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.averages = [parameter for module in self.average for parameter in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, betas=(0.9, 0.99), fused=True)
        parts = {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
            "average_unet": self.average[0],
            "average_text_encoder": self.average[1],
            "optimizer": self.optimizer,
        }
        self.checkpoint = Checkpoint(RUNS / "model.pt", minutes, parts)

    def _take_over(self, folder: Path) -> None:
        """Start from an earlier world's weights; a word keeps its embedding under its new number."""
        self.unet.load_state_dict(read_weights(folder / UNET))
        state = read_weights(folder / TEXT_ENCODER)
        numbers = load_tokenizer(folder / TOKENIZER_FOLDER).get_vocab()
        embedding = self.text_encoder.get_input_embeddings().weight.detach().clone()
        for word, number in self.tokenizer.get_vocab().items():
            if word in numbers:
                embedding[number] = state[TOKEN_EMBEDDING][numbers[word]]
        load_text_encoder_state(self.text_encoder, state | {TOKEN_EMBEDDING: embedding})

    def averaged(self) -> ToyModel:
        """The moving average as a model to sample from or to export."""
        autoencoder = PatchAutoencoder()
        autoencoder.load_state_dict(read_weights(WEIGHTS / AUTOENCODER))
        return ToyModel(*self.average, self.tokenizer, autoencoder.to(self.device))

    def evaluate(self, pictures_seen: int) -> None:
        """Sample prompts that are not trained on; the moving average is bundled when the judge likes it best so far."""
        toy = self.averaged()
        scenes = prompt_scenes(GRID_PROMPTS, GRID_SEED)
        pictures = sample(toy, [caption(scene) for scene in scenes], seed=0)
        picture_grid(list(pictures), 12).save(RUNS / f"grid_{pictures_seen}.png")
        right = readings(load_judge(), scenes, pictures) if (WEIGHTS / JUDGE).exists() else {}
        shares = {head: sum(values) / len(values) for head, values in right.items()}
        lines = CURVE.read_text().splitlines() if CURVE.exists() else []
        best = max((json.loads(line)["everything"] for line in lines), default=0.0)
        line = {"pictures": pictures_seen, "seconds": round(self.checkpoint.seconds)} | shares
        print("judge:", line, flush=True)
        with CURVE.open("a") as file:
            file.write(json.dumps({"everything": 0.0} | line) + "\n")
        if line.get("everything", 0.0) >= best:
            save_weights(toy.unet.state_dict(), WEIGHTS / UNET)
            save_weights(text_encoder_state(toy.text_encoder), WEIGHTS / TEXT_ENCODER)

    def update_average(self) -> None:
        """Follow the parameters, slowly once training is under way."""
        updates = self.checkpoint.step // EMA_EVERY
        decay = min(0.99, (updates + 1) / (updates + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)


def learning_rate(peak: float, step: int, done: float) -> float:
    """Linear warm-up, a plateau, then a cosine to almost zero at the end of the budget."""
    falling = max(0.0, done - PEAK_SHARE) / (1 - PEAK_SHARE)
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 * (1 + math.cos(math.pi * falling)) + 0.01)


def training_loss(
    training: ModelTraining, data: TrainingSet, chosen: np.ndarray, rng: np.random.Generator
) -> torch.Tensor:
    """Noise-prediction error, weighted by the figure's mask and by the noise level."""
    device, count = training.device, len(chosen)
    latents = data.latents[chosen].to(device).float()
    without = torch.from_numpy((rng.random(count) < WITHOUT_BACKGROUND).astype(np.int64))
    ids = data.ids[without, torch.from_numpy(chosen)].long()
    empty = torch.from_numpy(rng.random(count) < EMPTY_CAPTIONS)[:, None]
    ids = torch.where(empty, data.empty.long(), ids).to(device)
    # One timestep from each stretch of the schedule: less noise in the gradient than free draws.
    strata = (np.arange(count) + rng.random(count)) / count * TRAIN_STEPS
    timesteps = torch.from_numpy(rng.permutation(strata).astype(np.int64)).to(device)
    alphas = _ALPHAS.to(device)[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    context = training.text_encoder(input_ids=ids).last_hidden_state
    output = training.unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, context).sample
    error = ((output.float() - noise).square() * data.weights[chosen].to(device).float()).mean((1, 2, 3))
    return (error * noise_level_weight((alphas / (1 - alphas)).flatten())).mean()


def noise_level_weight(snr: torch.Tensor) -> torch.Tensor:
    """Weight of a noise level, so that all levels count about alike.

    The noise-prediction error that is left after training falls with the signal-to-noise ratio, about as its power
    0.6. Unweighted (or with min-SNR alone) the high noise levels, where a picture's layout is decided, hardly count,
    and the layout is learned last.
    """
    return snr.pow(-0.6).clamp(max=MAX_WEIGHT)


def train_model(minutes: float, seed: int, device: str, start_from: Path | None) -> None:
    """Train until `minutes` of training time are spent, counting the time before a resumed checkpoint."""
    prepare_training_set()
    # On a CPU two processes that average their weights now and then are faster than one process with two threads.
    processes = 2 if device == "cpu" else 1
    torch.multiprocessing.spawn(_worker, (processes, minutes, seed, device, start_from), nprocs=processes)


def _worker(rank: int, processes: int, minutes: float, seed: int, device: str, start_from: Path | None) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
        # Beside other load, Linux was seen to leave both processes on one core.
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[rank % len(cores)]})
    store = RUNS / f"rendezvous_{os.getppid()}"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    data = prepare_training_set()
    training = ModelTraining(minutes, seed, device, start_from)
    checkpoint = training.checkpoint
    if checkpoint.step == 0 and rank == 0:
        CURVE.unlink(missing_ok=True)
    # Each process draws other pictures and noise; after a resume, others than before.
    torch.manual_seed(hash((seed, rank, checkpoint.step)))
    rng = np.random.default_rng((seed, rank, checkpoint.step))
    losses, evaluated = [], time.monotonic()
    seen_at_start, printed = checkpoint.step, time.monotonic()
    done = checkpoint.done
    while done < 1:
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(training.peak, checkpoint.step, done)
        loss = training_loss(training, data, np.sort(rng.integers(0, PICTURES, BATCH)), rng)
        training.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.parameters, 1.0)
        training.optimizer.step()
        checkpoint.step += 1
        losses.append(loss.item())
        if checkpoint.step % AVERAGE_EVERY == 0:
            done = _synchronise(training, processes)
        if checkpoint.step % EMA_EVERY == 0:
            training.update_average()
        if rank != 0:
            continue
        if checkpoint.step % 200 == 0:
            speed = (checkpoint.step - seen_at_start) * BATCH * processes / (time.monotonic() - printed)
            seen = checkpoint.step * BATCH * processes
            print(f"{seen} pictures, {speed:.0f}/s, loss {np.mean(losses):.4f}, {done:.1%} done", flush=True)
            losses, seen_at_start, printed = [], checkpoint.step, time.monotonic()
        checkpoint.save_when_due()
        if time.monotonic() - evaluated > GRID_SECONDS:
            training.evaluate(checkpoint.step * BATCH * processes)
            evaluated = time.monotonic()
    if rank == 0:
        checkpoint.save()
        training.evaluate(checkpoint.step * BATCH * processes)
        print("end", flush=True)


def _synchronise(training: ModelTraining, processes: int) -> float:
    # The first process's clock decides, so that both stop after the same step.
    clock = torch.tensor([training.checkpoint.done])
    distributed.broadcast(clock, 0)
    if processes > 1:
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in training.parameters])
        distributed.all_reduce(flat)
        flat /= processes
        first = 0
        for parameter in training.parameters:
            parameter.data.copy_(flat[first : first + parameter.numel()].view(parameter.shape))
            first += parameter.numel()
    return clock.item()
