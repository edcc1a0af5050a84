#!/usr/bin/env bash
# PMP on COCO-Stuff with four backbones, each with prompt guidance and blind: the table of the claim that guidance helps.
#   DEVICES=8 DATA=../data scripts/runs/coco_stuff_pmp.sh [--dry]
#
# Expected, of each of the eight training runs:
#   devices  8 GPUs: 32 images a step, 4 a process. DEVICES may be any divisor of 32.
#   hours    unknown: no run of this size has been made, and PMP's paper, of which there is no code, is no source. 120,000 steps
#            are 33.3 hours for each second of a step (120,000 / 3,600); measure 100 steps first: --trainer.max_steps 100.
#   memory   of a GPU, unknown. Measured on a CPU: the R-50's two steps of two 512x512 images in float32, with all 171 prompts,
#            took 5.1 GiB, the whole process. Weights, gradients and AdamW's two moments are 16 bytes a parameter (computed): R-50
#            46.8 M 0.70 GiB; Swin-T 50.2 M 0.75; Swin-B 109.7 M 1.63; ConvNeXt-B 110.3 M 1.64; the text side comes on top. If it
#            is too much: --data.batch_size 2 --trainer.accumulate_grad_batches 2 (batch norms then see 2 images a process).
#   disk     the official zips as they lie; a run keeps checkpoints/best.ckpt and last.ckpt, 12 bytes a parameter each (computed).
# Evaluation: its hours are unknown, too; `evaluate` prints images a second, from which to tell after the first benchmark.
source "$(dirname "$0")/common.sh"

base=(-c conf/pmp_coco_stuff.yaml)
for backbone in r50 swin_t swin_b convnext; do
  if [ $backbone = r50 ]; then on_top=(); else on_top=(-c "conf/pmp_coco_stuff_$backbone.yaml"); fi
  for guidance in guided blind; do
    blind=()
    if [ $guidance = blind ]; then blind=(-c conf/pmp_coco_stuff_blind.yaml); fi
    name=pmp_coco_stuff_${backbone}_$guidance
    train "$name" 32 "${base[@]}" ${on_top[@]+"${on_top[@]}"} ${blind[@]+"${blind[@]}"} --data.root "$DATA/coco"
    score "$name" --name "PMP $backbone, $guidance"
  done
done
