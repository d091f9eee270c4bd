"""What the loop of train.py stands on. The loop itself is in train.py."""
