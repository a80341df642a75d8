"""Train the U-Net and the text encoder together on the cached latents."""

import copy
import math
import os
import time

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
    text_encoder_state,
)
from .render import picture_grid
from .sampling import sample
from .tokenizer import load_tokenizer
from .training_set import TrainingSet, prepare_training_set
from .vocabulary import caption
from .weights import AUTOENCODER, JUDGE, TEXT_ENCODER, UNET, WEIGHTS, read_weights, save_weights

BATCH = 16
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 200
# The learning rate stays at its peak for this share of the budget, then falls as a cosine.
PEAK_SHARE = 0.25
EMPTY_CAPTIONS = 0.1
WITHOUT_BACKGROUND = 0.15
MAX_WEIGHT = 16.0
EMBEDDING_STD = 0.1
AVERAGE_EVERY = 4
EMA_EVERY = 5
CHECKPOINT_SECONDS = 150
EXPORT_SECONDS = 600
GRID_SECONDS = 300
GRID_PROMPTS = 48
GRID_SEED = HELD_OUT_SEED + 3
CHECKPOINT = RUNS / "model.pt"
_ALPHAS = DDIMScheduler(**SCHEDULER).alphas_cumprod


class ModelTraining:
    """The trained parts with their optimizer, moving average and clock; all of it is in the checkpoint."""

    def __init__(self, seed: int, device: str):
        torch.manual_seed(seed)
        self.device = device
        self.tokenizer = load_tokenizer(WEIGHTS / TOKENIZER_FOLDER)
        self.unet = build_unet().to(device, memory_format=torch.channels_last)
        start_as_copy(self.unet)
        self.text_encoder = build_text_encoder(self.tokenizer).to(device)
        # A larger start than transformers' lets the words tell the pictures apart sooner.
        for module in self.text_encoder.modules():
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=EMBEDDING_STD)
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, betas=(0.9, 0.99), fused=True)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.step = 0
        self.seconds = 0.0
        if CHECKPOINT.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(CHECKPOINT, map_location=self.device)
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step, self.seconds = state["step"], state["seconds"]

    def save_checkpoint(self) -> None:
        """Write everything needed to go on from here."""
        temporary = CHECKPOINT.with_suffix(".tmp")
        state = {
            "unet": self.unet.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, temporary)
        os.replace(temporary, CHECKPOINT)

    def averaged(self) -> ToyModel:
        """The moving average as a model to sample from or to export."""
        autoencoder = PatchAutoencoder()
        autoencoder.load_state_dict(read_weights(WEIGHTS / AUTOENCODER))
        toy = ToyModel(
            copy.deepcopy(self.unet), copy.deepcopy(self.text_encoder), self.tokenizer, autoencoder.to(self.device)
        )
        targets = [*toy.unet.parameters(), *toy.text_encoder.parameters()]
        for target, value in zip(targets, self.average):
            target.data.copy_(value)
        toy.unet.eval()
        toy.text_encoder.eval()
        return toy

    def export(self) -> None:
        """Write the moving average to the bundled weights."""
        toy = self.averaged()
        save_weights(toy.unet.state_dict(), WEIGHTS / UNET)
        save_weights(text_encoder_state(toy.text_encoder), WEIGHTS / TEXT_ENCODER)

    def show(self, name: str) -> None:
        """Sample prompts that are not trained on, write the pictures, and print what the judge reads from them."""
        scenes = prompt_scenes(GRID_PROMPTS, GRID_SEED)
        pictures = sample(self.averaged(), [caption(scene) for scene in scenes], seed=0)
        picture_grid(list(pictures), 12).save(RUNS / f"grid_{name}.png")
        if (WEIGHTS / JUDGE).exists():
            right = readings(load_judge(), scenes, pictures)
            print("judge:", {head: f"{sum(values) / len(values):.0%}" for head, values in right.items()}, flush=True)

    def update_average(self) -> None:
        """Follow the parameters, slowly once training is under way."""
        updates = self.step // EMA_EVERY
        decay = min(0.99, (updates + 1) / (updates + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)


def learning_rate(step: int, done: float) -> float:
    """Linear warm-up, a plateau, then a cosine to almost zero at the end of the budget."""
    falling = max(0.0, done - PEAK_SHARE) / (1 - PEAK_SHARE)
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 * (1 + math.cos(math.pi * falling)) + 0.01)


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


def train_model(minutes: float, seed: int, device: str) -> None:
    """Train until `minutes` of training time are spent, counting the time before a resumed checkpoint."""
    prepare_training_set()
    # On a CPU two processes that average their weights now and then are faster than one process with two threads.
    processes = 2 if device == "cpu" else 1
    torch.multiprocessing.spawn(_worker, (processes, minutes, seed, device), nprocs=processes)


def _worker(rank: int, processes: int, minutes: float, seed: int, device: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
        # Beside other load, Linux was seen to leave both processes on one core.
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[rank % len(cores)]})
    store = RUNS / f"rendezvous_{os.getppid()}"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    data = prepare_training_set()
    training = ModelTraining(seed, device)
    # Each process draws other pictures and noise; after a resume, others than before.
    torch.manual_seed(hash((seed, rank, training.step)))
    rng = np.random.default_rng((seed, rank, training.step))
    last = {"checkpoint": time.time(), "export": time.time(), "grid": time.time(), "print": time.time()}
    budget, losses, step_at_print = minutes * 60, [], training.step
    start = time.time() - training.seconds
    done = training.seconds / budget
    while done < 1:
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(training.step, done)
        loss = training_loss(training, data, np.sort(rng.integers(0, PICTURES, BATCH)), rng)
        training.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.parameters, 1.0)
        training.optimizer.step()
        training.step += 1
        losses.append(loss.item())
        if training.step % AVERAGE_EVERY == 0:
            done = _synchronise(training, processes, (time.time() - start) / budget)
        if training.step % EMA_EVERY == 0:
            training.update_average()
        if rank != 0:
            continue
        training.seconds = time.time() - start
        if training.step % 200 == 0:
            speed = (training.step - step_at_print) * BATCH * processes / (time.time() - last["print"])
            seen = training.step * BATCH * processes
            print(f"{seen} pictures, {speed:.0f}/s, loss {np.mean(losses):.4f}, {done:.1%} done", flush=True)
            losses, step_at_print, last["print"] = [], training.step, time.time()
        if time.time() - last["checkpoint"] > CHECKPOINT_SECONDS:
            training.save_checkpoint()
            last["checkpoint"] = time.time()
        if time.time() - last["export"] > EXPORT_SECONDS:
            training.export()
            last["export"] = time.time()
        if time.time() - last["grid"] > GRID_SECONDS:
            training.show(str(training.step * BATCH * processes))
            last["grid"] = time.time()
    if rank == 0:
        training.save_checkpoint()
        training.export()
        training.show("end")
        print("end", flush=True)


def _synchronise(training: ModelTraining, processes: int, done: float) -> float:
    # The first process's clock decides, so that both stop after the same step.
    clock = torch.tensor([done])
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
