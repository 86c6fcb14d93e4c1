#!/bin/bash
# PPO of the 6.9B model on several nodes of 8 GPUs without a scheduler. On every node:
# Started again, it goes on from its last checkpoint.
#   NODES=2 NODE=0 HEAD=10.0.0.1 bash configs/cluster/torchrun.sh     (NODE=1 on the second one, and so on)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that SIGTERM leaves for saving; 30 by default
torchrun --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node 8 --master_addr "$HEAD" --master_port 29500 \
    train.py fit --config configs/tldr/common.yaml --config configs/tldr/ppo.yaml --config configs/tldr/ppo_6.9b.yaml \
    --run_dir runs/tldr_6.9b/ppo --ckpt_path last --trainer.num_nodes "$NODES"
