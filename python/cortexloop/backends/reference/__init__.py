"""Pure torch: any device, float32 and float64. Slow, readable, always there; the yardstick of every other backend."""
