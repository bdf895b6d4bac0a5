"""Search over token strings: which can be typed, what they are to bring about, their loss, and changes of them."""
