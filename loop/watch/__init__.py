"""While a training runs: sensors, alarms and their actions, a truce with production, energy. No torch.

The parent reads the sensors, not the trainer: readings go on while the trainer hangs or is paused, the trainer's
environment needs nothing for it, and whoever must act on an alarm has seen it first hand.
"""
