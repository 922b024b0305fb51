"""From what a user calls a checkpoint to its files: names of the hub, folders, and formats that are none of ours."""
