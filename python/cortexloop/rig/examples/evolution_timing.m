% Timing script for evolution_userloop.m: fixation, then the images of the trial one after the other.
% For NIMH MonkeyLogic 2 (scene framework); written after its manual, not yet tried on a rig.

fixation_point = 1;
hold_radius = 1.5;     % degrees
wait_ms = 3000;
settle_ms = 200;
on_ms = 100;
off_ms = 150;

files = TrialRecord.User.files;
n = numel(files);

% Fixation is acquired and held for a moment.
fix = SingleTarget(eye_);
fix.Target = fixation_point;
fix.Threshold = hold_radius;
acquire = WaitThenHold(fix);
acquire.WaitTime = wait_ms;
acquire.HoldTime = settle_ms;
run_scene(create_scene(acquire, fixation_point), 10);

outcome = repmat({'no_fix'}, 1, n);
onsets_ms = nan(1, n);
if acquire.Success
    % Images and gaps alternate while fixation is held; the event markers 101, 102, ... go to the recording system.
    changer = ImageChanger(null_);
    changer.DurationUnit = 'msec';
    list = cell(0, 4);
    for k = 1:n
        list(end + 1, :) = {files(k), [0 0], on_ms, 100 + k}; %#ok<SAGROW>
        list(end + 1, :) = {[], [], off_ms, []}; %#ok<SAGROW>
    end
    changer.List = list;
    hold = WaitThenHold(fix);
    hold.WaitTime = 0;
    hold.HoldTime = n * (on_ms + off_ms);
    both = Concurrent(hold);
    both.add(changer);
    run_scene(create_scene(both, fixation_point), 20);
    shown = changer.Time(1:2:end);             % when the images came on, in milliseconds of the trial
    complete = numel(changer.Time(2:2:end));   % an image counts if it went off as planned, too
    onsets_ms(1:numel(shown)) = shown;
    outcome(1:n) = {'abort'};
    outcome(1:min(complete, n)) = {'ok'};
end
TrialRecord.User.outcome = outcome;
TrialRecord.User.onsets_ms = onsets_ms;
trialerror(4 * ~all(strcmp(outcome, 'ok')));   % 0: correct, 4: no fixation
if all(strcmp(outcome, 'ok')), goodmonkey(100); end
