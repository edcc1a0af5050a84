#!/usr/bin/env bash
# One training run on several machines, through torchrun. Start it on each of them, with the same arguments and its own NODE_RANK:
#   NODE_RANK=0 MASTER_ADDR=first-machine scripts/runs/torchrun_two_nodes.sh -c conf/pmp_coco_stuff.yaml --data.batch_size 2
#   NODE_RANK=1 MASTER_ADDR=first-machine scripts/runs/torchrun_two_nodes.sh -c conf/pmp_coco_stuff.yaml --data.batch_size 2
# batch_size is of one process: 2 x 8 x 2 is the recipe's 32. The folder of the run must be one that all machines see.
set -euo pipefail
NODES=${NODES:-2}
DEVICES=${DEVICES:-8}                          # GPUs of each machine
MASTER_PORT=${MASTER_PORT:-29500}
exec torchrun --nnodes "$NODES" --nproc_per_node "$DEVICES" --node_rank "$NODE_RANK" \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -m pmpseg.fit "$@" \
  --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES" --trainer.strategy ddp
