"""What the method needs beside models and quantizers: losses, attention, data, images, evaluation, pictures, words."""
