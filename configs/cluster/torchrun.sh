#!/bin/bash
# PPO of the 6.9B model on several nodes of 8 GPUs without a scheduler. On every node:
#   NODES=2 NODE=0 HEAD=10.0.0.1 bash configs/cluster/torchrun.sh     (NODE=1 on the second one, and so on)
RUN=runs/tldr_6.9b/ppo
if [ -e "$RUN/config.yaml" ]; then RESUME="--ckpt_path last"; fi
torchrun --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node 8 --master_addr "$HEAD" --master_port 29500 \
    train.py fit --config configs/tldr/common.yaml --config configs/tldr/ppo.yaml --config configs/tldr/ppo_6.9b.yaml \
    --run_dir "$RUN" --trainer.num_nodes "$NODES" $RESUME
