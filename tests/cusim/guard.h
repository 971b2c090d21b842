// A kernel that does not end, or that touches memory that is not there, becomes a fault: those who
// run it neither wait for ever nor crash.
#pragma once

#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "fibers.h"

namespace cusim {

constexpr int GUARDED[] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
constexpr int N_GUARDED = sizeof GUARDED / sizeof *GUARDED;

static pid_t launcher;  // the system's thread that runs the kernel
// Handlers have a stack of their own: that of a fiber may be what has run out.
static char handler_stack[64 << 10];

CUSIM_SLOW void on_signal(int number, siginfo_t* info, void*) {
    const bool is_ours = gettid() == launcher && current != nullptr && current != &outside;
    if (number == SIGVTALRM && !is_ours) return;  // between two blocks: it comes again
    if (!is_ours) {
        signal(number, SIG_DFL);  // what went wrong goes wrong again, and ends the process
        return;
    }
    Fault* f = new_fault(number == SIGVTALRM ? ENDLESS : number == SIGFPE ? ARITHMETIC : BOUNDS);
    f->line = current->line;
    if (f->kind == BOUNDS) f->address = uint64_t(info->si_addr);
    leave();
}

static stack_t stack_before;
static struct sigaction actions_before[N_GUARDED];
static timer_t timer;
static bool has_timer;

// From here on what runs is a kernel, for at most so many seconds of processor time.
CUSIM_SLOW void begin_guard(double seconds) {
    launcher = gettid();
    stack_t stack = {};
    stack.ss_sp = handler_stack;
    stack.ss_size = sizeof handler_stack;
    sigaltstack(&stack, &stack_before);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // a handler does not return
    for (int i = 0; i < N_GUARDED; i++) sigaction(GUARDED[i], &action, &actions_before[i]);
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGVTALRM;
    event._sigev_un._tid = launcher;
    has_timer = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
    const time_t whole = time_t(seconds);
    const itimerspec times = {{0, 10'000'000}, {whole, long((seconds - whole) * 1e9)}};
    if (has_timer) timer_settime(timer, 0, &times, nullptr);
}

CUSIM_SLOW void end_guard() {
    if (has_timer) timer_delete(timer);
    for (int i = 0; i < N_GUARDED; i++) sigaction(GUARDED[i], &actions_before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
}

}  // namespace cusim
