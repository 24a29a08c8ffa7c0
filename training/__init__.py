"""How the bundled model `tales` is made: corpus, tokenizer, training, evaluation."""
