"""What every method shares that distils services into students: its settings, its loop, and a student's training."""
