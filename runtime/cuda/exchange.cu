// Words in host memory that the device and the CPU write for each other (ahead.py). They are
// numbers that grow; the first of a token is where `base`, which only the host writes, and only
// before the token, lets them begin: read early, it is there when it is needed.
#include "common.cuh"

struct write_word_args {
    int* word;
    const int* base;
    int number;
};

// *word = *base + number, once the host sees all that was written before.
//
// launch: grid 1, block 32
extern "C" __global__ void __launch_bounds__(32) write_word(const write_word_args p) {
    const unsigned value = unsigned(*p.base) + unsigned(p.number);
    after_predecessors();
    if (threadIdx.x != 0) return;
    __threadfence_system();
    *(volatile int*)p.word = int(value);
}

struct wait_word_args {
    const int* word;
    const int* base;
    int number;
};

// Ends when *word is *base + number or beyond (numbers may wrap); what the host wrote before that
// is seen by all that comes after. One thread looks, over the bus: some 1 us each time.
//
// launch: grid 1, block 32
extern "C" __global__ void __launch_bounds__(32) wait_word(const wait_word_args p) {
    const unsigned value = unsigned(*p.base) + unsigned(p.number);
    after_predecessors();
    if (threadIdx.x != 0) return;
    while (int(unsigned(*(const volatile int*)p.word) - value) < 0) {
    }
    __threadfence_system();
}
