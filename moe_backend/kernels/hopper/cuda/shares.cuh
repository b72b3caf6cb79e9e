// How an expert's tokens are split into items: for those that list experts and those that work through the list.
#pragma once

#include "common.cuh"

// Tokens of each item but perhaps the last, if one has at most `most`, a multiple of 8: evenly, in eights.
DEVICE int even_share(int tokens, int most) {
    const int items = tokens > most ? (tokens + most - 1) / most : 1;
    return (tokens + 8 * items - 1) / (8 * items) * 8;
}
