"""Stands in for timm's train.py, which no package carries: the same options, and the same calls of timm in its order.

Only what a short run on a CPU needs; `--amp` there means bfloat16.
"""

import argparse

import torch
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model, model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2

parser = argparse.ArgumentParser()
for option in ("data-dir", "model", "opt", "sched", "output", "experiment", "gp", "initial-checkpoint"):
    parser.add_argument(f"--{option}")
for option in ("drop-path", "drop-block", "clip-grad", "layer-decay", "bn-momentum", "bn-eps"):
    parser.add_argument(f"--{option}", type=float)
for option, default in {"lr": 0.05, "weight-decay": 2e-5, "drop": 0.0, "momentum": 0.9}.items():
    parser.add_argument(f"--{option}", type=float, default=default)
for option, default in {"epochs": 300, "warmup-epochs": 5, "batch-size": 128, "workers": 4}.items():
    parser.add_argument(f"--{option}", type=int, default=default)
for option in ("num-classes", "in-chans"):
    parser.add_argument(f"--{option}", type=int)
parser.add_argument("--input-size", nargs=3, type=int)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--grad-checkpointing", action="store_true")


def main():
    utils.setup_default_logging()
    args = parser.parse_args()
    torch.manual_seed(42)
    model = create_model(
        args.model,
        pretrained=False,
        in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        scriptable=False,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )
    args.num_classes = model.num_classes
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    data_config = resolve_data_config(vars(args), model=model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    loaders = {}
    for split, is_training in (("train", True), ("validation", False)):
        dataset = create_dataset("", root=args.data_dir, split=split, is_training=is_training)
        loaders[split] = create_loader(
            dataset,
            input_size=data_config["input_size"],
            batch_size=args.batch_size,
            is_training=is_training,
            use_prefetcher=False,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
            num_workers=args.workers,
            crop_pct=data_config["crop_pct"],
            device=torch.device("cpu"),
        )
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched or "cosine",
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=True,
    )
    folder = utils.get_outdir(args.output or "./output/train", args.experiment)
    saver = utils.CheckpointSaver(model, optimizer, args=args, checkpoint_dir=folder, recovery_dir=folder)
    loss_fn = LabelSmoothingCrossEntropy(smoothing=0.1)
    for epoch in range(epochs):
        model.train()
        for images, target in loaders["train"]:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                loss = loss_fn(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            if args.clip_grad is not None:
                utils.dispatch_clip_grad(model_parameters(model), value=args.clip_grad)
            optimizer.step()
        model.eval()
        top1 = utils.AverageMeter()
        with torch.no_grad():
            for images, target in loaders["validation"]:
                top1.update(utils.accuracy(model(images), target)[0].item(), len(images))
        print(f"epoch {epoch} loss {loss.item():.4f} top1 {top1.avg:.1f}")
        saver.save_checkpoint(epoch, metric=top1.avg)
        scheduler.step(epoch + 1, top1.avg)


if __name__ == "__main__":
    main()
