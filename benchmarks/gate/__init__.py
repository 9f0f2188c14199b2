"""What the study of the gate is made of: honest pipelines, the data they run on, and planted corruptions."""
