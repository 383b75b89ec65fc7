"""Chat rows: read them, render them by the model's template, mask them, batch them, say what became of each."""
