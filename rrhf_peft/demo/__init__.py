"""The embedded default: text, base model, reward, and the whole way to a merged model."""
