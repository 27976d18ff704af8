"""What is read off a model: observables and sets of them, readouts of logits, sequences and sites."""
