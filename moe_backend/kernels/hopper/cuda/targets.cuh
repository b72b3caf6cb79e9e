// Where the outputs of a position go: of a token's only local slot straight to the token's row, with its routing weight.
#pragma once

#include "common.cuh"

struct alignas(8) Target {
    int row;  // of the sums; or -1: others are added, by a later launch
    float weight;
};
