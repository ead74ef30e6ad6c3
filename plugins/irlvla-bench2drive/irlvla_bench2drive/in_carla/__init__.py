"""What runs in CARLA's Python (3.7), apart from irlvla: the agent of the leaderboard, and a script that reads CARLA's maps."""
